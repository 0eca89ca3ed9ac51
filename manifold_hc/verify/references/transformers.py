"""Modules of transformers that hold mHC: `deepseek_v4` and `glm5_next`.

The decoder layer's own forward pass runs with its attention and feed-forward replaced by the given
branch output, so that its read, its write and the direction of its mixing are those of the library.
"""

import inspect
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from manifold_hc.config import ConnectionConfig
from manifold_hc.extras import require
from manifold_hc.numerics import preset
from manifold_hc.verify.references.implementation import Implementation, Tensors
from manifold_hc.verify.widened import Widened

LayerForward = Callable[..., Any]


def deepseek_v4(config: ConnectionConfig, channels: int) -> Implementation:
    """Return the connections and the head of `DeepseekV4Model`, computed in float64."""
    require("mhc verify --checkpoint of transformers' layout", "transformers")
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

    sizes = _sizes(config, channels)
    head = modeling.DeepseekV4HyperHead(sizes)

    def exit(tensors: Tensors, x: Tensor) -> Tensor:
        # The released files have no second "hc_" in the head's names.
        named = {f"hc_{name.removeprefix('hc_')}": tensor for name, tensor in tensors.items()}
        return _call(head, named, x.unsqueeze(0)).squeeze(0)

    return Implementation(
        _sublayer(
            modeling.DeepseekV4HyperConnection(sizes), modeling.DeepseekV4DecoderLayer.forward
        ),
        exit if config.exit_rule == "learned" else None,
    )


def glm5(config: ConnectionConfig, channels: int) -> Implementation:
    """Return the connections and the mean of `Glm5NextTextModel`, computed in float64."""
    require("mhc verify --checkpoint of transformers' layout", "transformers")
    from transformers.models.glm5_next import modeling_glm5_next as modeling

    sizes = _sizes(config, channels)
    head = modeling.Glm5NextTextHyperHead()

    def exit(tensors: Tensors, x: Tensor) -> Tensor:
        return _call(head, {}, x.unsqueeze(0)).squeeze(0)

    return Implementation(
        _sublayer(
            modeling.Glm5NextTextHyperConnection(sizes), modeling.Glm5NextTextDecoderLayer.forward
        ),
        exit if config.exit_rule == "mean" else None,
    )


def _sizes(config: ConnectionConfig, channels: int) -> Any:
    """Return the fields that the modules take from their configuration."""
    numerics = preset(config.numerics, norm_eps=config.norm_eps, hc_eps=config.hc_eps)
    return SimpleNamespace(
        hc_mult=config.n,
        hidden_size=channels,
        hc_sinkhorn_iters=config.iterations,
        hc_eps=numerics.hc_eps,
        rms_norm_eps=numerics.norm_eps,
    )


def _sublayer(module: nn.Module, forward: LayerForward) -> Any:
    """Return a function that runs one sublayer through the decoder layer's forward pass."""
    # Gradient checkpointing wraps the method, and asks the layer's class for it.
    forward = inspect.unwrap(forward)

    def sublayer(index: int, tensors: Tensors, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}
        branch_output = y.unsqueeze(0)

        def connection(streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            post, comb, u = _call(module, tensors, streams)
            seen.update(post=post.squeeze(0), u=u.squeeze(0))
            return post, comb, u

        # Even sublayers are the attention's, odd ones the feed-forward's; the other half of the
        # layer passes the streams on: comb = I, post = 0.
        halves = (connection, _pass_on) if index % 2 == 0 else (_pass_on, connection)
        layer = SimpleNamespace(
            attn_hc=halves[0],
            ffn_hc=halves[1],
            block_type="linear_attention",
            input_layernorm=nn.Identity(),
            post_attention_layernorm=nn.Identity(),
            self_attn=_Attention(branch_output),
            mlp=lambda u, **_: branch_output,
        )
        with Widened():
            new = forward(layer, x.unsqueeze(0))
        return {**seen, "new": (new[0] if isinstance(new, tuple) else new).squeeze(0)}

    return sublayer


class _Attention:
    """Attention of both models: called by keyword it returns a tensor, else a tuple."""

    def __init__(self, output: Tensor) -> None:
        self.output = output

    def __call__(self, *u: Tensor, **arguments: Any) -> Any:
        return (self.output, None) if u else self.output


def _pass_on(streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n = streams.shape[-2]
    post = streams.new_zeros(streams.shape[:-1])
    eye = torch.eye(n, dtype=streams.dtype).expand(*streams.shape[:-2], n, n)
    return post, eye, streams[..., 0, :]


def _call(module: nn.Module, tensors: Mapping[str, Tensor], x: Tensor) -> Any:
    with Widened():
        return torch.func.functional_call(module, dict(tensors), (x,), strict=True)
