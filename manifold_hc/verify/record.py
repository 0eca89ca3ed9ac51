"""Recorder: the connections' tensors of a transformers model while it runs."""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from manifold_hc.errors import ConfigError
from manifold_hc.verify.wide_connections import in_float64

HALVES = (("attn_hc", "self_attn"), ("ffn_hc", "mlp"))
"""Connection and branch of both sublayers of a layer, as transformers names them."""


def record(model: nn.Module, tokens: Tensor, float64: bool = True) -> dict[str, Tensor]:
    """Record the connections of a transformers model for `mhc verify --recorded`.

    Hooks take the streams before every sublayer, the input that it reads, the output of its branch,
    and the streams after it, from one forward pass. The model is left as it was.

    Args:
        model: A model whose layers have the modules `attn_hc`, `self_attn`, `ffn_hc` and `mlp`,
            as `deepseek_v4` and `glm5_next` have.
        tokens: Token numbers [B, T] on the model's device; a few are enough.
        float64: True to run the connections in float64, which shows a change of 1e-3 in one
            weight; the branches keep their dtype. False to run all as it is.

    Returns:
        The tensors by the names of a recording, on the CPU; write them with
        `safetensors.torch.save_file`.

    Raises:
        ConfigError: For a model without such layers.

    Example:
        >>> from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
        >>> from manifold_hc.verify import record
        >>> sizes = dict(hidden_size=16, num_hidden_layers=1, vocab_size=32, n_routed_experts=2,
        ...     num_experts_per_tok=1, moe_intermediate_size=8, num_attention_heads=2, head_dim=8,
        ...     q_lora_rank=8, o_lora_rank=8, o_groups=2, index_n_heads=2, index_head_dim=8)
        >>> model = DeepseekV4ForCausalLM(DeepseekV4Config(**sizes))
        >>> sorted(record(model, torch.tensor([[1, 2, 3]])))[:3]
        ['exit.h', 'exit.x', 'sublayers.0.new']
    """
    layers = [
        module
        for module in model.modules()
        if all(hasattr(module, name) for half in HALVES for name in half)
    ]
    heads = [module for name, module in model.named_modules() if name.endswith("hc_head")]
    if not layers or len(heads) != 1:
        raise ConfigError(
            "record: the model must have layers with attn_hc and ffn_hc, and one hc_head, as "
            f"deepseek_v4 of transformers has, but {type(model).__name__} has {len(layers)} and "
            f"{len(heads)}"
        )
    found: dict[str, Tensor] = {}
    with ExitStack() as undo:
        if float64:
            undo.enter_context(in_float64(layers, heads[0]))
        for layer, module in enumerate(layers):
            for half, (connection, branch) in enumerate(HALVES):
                name = f"sublayers.{2 * layer + half}"
                _take(
                    undo,
                    getattr(module, connection),
                    found,
                    f"{name}.x",
                    f"{name}.post",
                    f"{name}.u",
                )
                _take(undo, getattr(module, branch), found, "", f"{name}.y")
        _take(undo, heads[0], found, "exit.x", "exit.h")
        with torch.no_grad():
            model(tokens, use_cache=False)
    following = [f"sublayers.{index}.x" for index in range(1, 2 * len(layers))] + ["exit.x"]
    for index, after in enumerate(following):
        found[f"sublayers.{index}.new"] = found[after].clone()
    return found


def _take(
    undo: ExitStack, module: nn.Module, found: dict[str, Tensor], first: str, *results: str
) -> None:
    """Record a module's first input and its results; "" records no input.

    A connection returns (post, comb, u), an attention (output, weights, ...).
    """

    def hook(_: nn.Module, inputs: tuple[Any, ...], result: Any) -> None:
        if first:
            found[first] = _copy(inputs[0])
        ends = (result[0], result[-1]) if isinstance(result, tuple) else (result,)
        found.update(zip(results, map(_copy, ends[: len(results)]), strict=True))

    undo.callback(module.register_forward_hook(hook, prepend=True).remove)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
