"""The models of the mHC paper (arXiv 2512.24880, appendix) in terms of torchtitan's DeepSeek-V3."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torchtitan.components.optimizer import register_moe_load_balancing_hook
from torchtitan.distributed.pipeline_parallel import pipeline_llm
from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.deepseek_v3 import (
    DeepSeekV3Model,
    build_mla_moe_layers,
    parallelize_deepseekv3,
)
from torchtitan.protocols.model_spec import ModelSpec

from manifold_hc.models import DecoderConfig

Initial = dict[str, Callable[..., Any]]
"""Functions that set the initial value of a parameter, by its name."""


def paper_spec(name: str, model: DecoderConfig, sequence: int) -> ModelSpec:
    """Return torchtitan's specification of a residual model with the sizes of a decoder.

    Attention has no query compression. Gates are sigmoids, normalised over the chosen experts. All
    matrices are normal with standard deviation `model.init_std`.

    Args:
        name: Name of the size in torchtitan's log.
        model: Sizes of the decoder.
        sequence: Largest sequence length T in tokens.
    """
    attention, experts = model.attention, model.experts
    matrices, ones = _normal("weight", std=model.init_std), {"weight": nn.init.ones_}
    stacked = _normal("w1_EFD", "w2_EDF", "w3_EFD", std=model.init_std)
    layers = build_mla_moe_layers(
        n_layers=model.blocks,
        n_dense_layers=experts.dense_blocks,
        dim=model.channels,
        n_heads=attention.heads,
        q_lora_rank=0,
        kv_lora_rank=attention.latent_size,
        qk_nope_head_dim=attention.head_size,
        qk_rope_head_dim=attention.rotary_size,
        v_head_dim=attention.head_size,
        mscale=1.0,
        dense_hidden_dim=model.feed_forward,
        moe_hidden_dim=experts.width,
        num_experts=experts.routed,
        num_shared_experts=experts.shared,
        router_top_k=experts.active,
        router_score_func="sigmoid",
        router_route_norm=True,
        attn_backend="flex",
        moe_comm_backend="standard",
        non_blocking_capacity_factor=None,
        linear_init=matrices,
        norm_init=ones,
        depth_init=lambda block: matrices,
        depth_experts_init=lambda block: stacked,
        rope=ComplexRoPE.Config(
            dim=attention.rotary_size, max_seq_len=sequence, theta=attention.theta
        ),
    )
    config = DeepSeekV3Model.Config(
        vocab_size=model.vocabulary,
        dim=model.channels,
        tok_embeddings=Embedding.Config(
            num_embeddings=model.vocabulary, embedding_dim=model.channels, param_init=matrices
        ),
        norm=RMSNorm.Config(normalized_shape=model.channels, param_init=ones),
        lm_head=Linear.Config(
            in_features=model.channels, out_features=model.vocabulary, param_init=matrices
        ),
        layers=layers,
    )
    for _, norm, _, _ in config.traverse(RMSNorm.Config):
        norm.eps = model.norm_eps
    for layer in layers:
        if layer.moe is not None:
            layer.moe.load_balance_coeff = experts.balancing
    return ModelSpec(
        name="deepseek_v3",
        flavor=name,
        model=config,
        parallelize_fn=parallelize_deepseekv3,
        pipelining_fn=pipeline_llm,
        post_optimizer_build_fn=register_moe_load_balancing_hook,
        state_dict_adapter=None,
    )


def _normal(*names: str, std: float) -> Initial:
    return {name: partial(nn.init.normal_, std=std) for name in names}
