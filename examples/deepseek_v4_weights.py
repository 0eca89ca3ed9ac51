"""Load DeepSeek-V4's connections, and compare with transformers' DeepSeek-V4.

    pip install 'manifold-hc[bench]'                    # brings transformers
    python examples/deepseek_v4_weights.py

A tiny DeepSeek-V4 with random weights takes the place of a checkpoint. Attention and experts are
those of transformers; the streams go through an mhc.Stack with the checkpoint's connections.
Hidden states and gradients are compared.
"""

from functools import partial

import torch
from torch import Tensor, nn

import manifold_hc as mhc
from manifold_hc.interop import load_deepseek

try:
    from transformers import DeepseekV4Config, DeepseekV4Model
except ImportError:
    raise SystemExit("needs transformers: pip install 'manifold-hc[bench]'") from None

CHANNELS, LAYERS, STREAMS = 32, 3, 4


def tiny_deepseek() -> DeepseekV4Model:
    """A DeepSeek-V4 with a few thousand parameters in each module."""
    config = DeepseekV4Config(
        vocab_size=64,
        hidden_size=CHANNELS,
        moe_intermediate_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        head_dim=16,
        q_lora_rank=16,
        o_groups=1,
        o_lora_rank=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        layer_types=["sliding_attention"] * LAYERS,
        mlp_layer_types=["moe"] * LAYERS,
        hc_mult=STREAMS,
    )
    model = DeepseekV4Model(config).eval()
    for name, parameter in model.named_parameters():
        if "hc" in name:
            nn.init.normal_(parameter, std=0.5)
    return model


def connected(model: DeepseekV4Model) -> mhc.Stack:
    """A stack with the model's connections: two sublayers for each layer, and the exit."""
    config = mhc.ConnectionConfig(kind="mhc", streams=STREAMS, numerics="deepseek_v4")
    stack = mhc.Stack(CHANNELS, config, sublayers=2 * LAYERS)
    load_deepseek(stack, model.state_dict())  # or the tensors of a checkpoint's safetensors files
    return stack


def with_stack(model: DeepseekV4Model, stack: mhc.Stack, h: Tensor) -> Tensor:
    """The model's layers with our stack: embedded tokens in, hidden states out, both [B, T, C]."""
    position_ids = torch.arange(h.shape[1]).unsqueeze(0)
    rotary = {
        kind: model.rotary_emb(h, position_ids=position_ids, layer_type=kind)
        for kind in ("main", "compress")
    }
    causal = torch.full((h.shape[1], h.shape[1]), -torch.inf).triu(1)[None, None]

    def attend(layer: nn.Module, u: Tensor) -> Tensor:
        return layer.self_attn(
            layer.input_layernorm(u),
            position_embeddings=rotary,
            position_ids=position_ids,
            attention_mask=causal,
        )[0]

    def feed_forward(layer: nn.Module, u: Tensor) -> Tensor:
        return layer.mlp(layer.post_attention_layernorm(u))

    branches = [
        partial(branch, layer) for layer in model.layers for branch in (attend, feed_forward)
    ]
    return model.norm(stack(h, branches))


def compare(tokens: int = 12) -> dict[str, float]:
    """Largest differences of outputs and gradients, relative to the largest entry."""
    torch.manual_seed(0)
    model = tiny_deepseek()
    stack = connected(model)
    h = model.embed_tokens(torch.randint(64, (2, tokens))).detach().requires_grad_()
    expected = model(inputs_embeds=h, use_cache=False).last_hidden_state
    actual = with_stack(model, stack, h)
    cotangent = torch.randn_like(expected)
    gradients = [torch.autograd.grad(out, h, cotangent)[0] for out in (actual, expected)]
    return {
        "hidden states": difference(actual.detach(), expected.detach()),
        "gradients": difference(*gradients),
    }


def difference(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


if __name__ == "__main__":
    for quantity, error in compare().items():
        print(f"{quantity}: largest difference {error:.1e} of the largest entry")
