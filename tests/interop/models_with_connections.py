"""Small random models of transformers with hyper-connections; their maps are asymmetric."""

import warnings

import torch

EPS = {"hc_eps": 1e-3, "rms_norm_eps": 3e-3}
"""Large and different, so that a wrong epsilon shows."""

ITERATIONS = {"hc_sinkhorn_iters": 3}
"""Few, so that another number of them shows."""

SMOOTH = {"num_experts_per_tok": 4, "index_topk": 16}
"""All experts and all tokens: no choice between them that a rounding could change."""

ENDS = {"pad_token_id": None, "bos_token_id": 0, "eos_token_id": None, "vocab_size": 61}


def deepseek_v4(**changes):
    """A language model with every kind of attention, and a router that needs the tokens."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    sizes = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "head_dim": 16,
        "partial_rotary_factor": 0.5,
        "q_lora_rank": 16,
        "o_groups": 2,
        "o_lora_rank": 8,
        "n_routed_experts": 4,
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "layer_types": [
            "sliding_attention",
            "heavily_compressed_attention",
            "compressed_sparse_attention",
        ],
        "sliding_window": 8,
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_topk": 2,
        "max_position_embeddings": 64,
    }
    return drawn(
        DeepseekV4ForCausalLM, DeepseekV4Config(**sizes | EPS | ITERATIONS | ENDS | changes)
    )


def glm5_next(**changes):
    """A decoder with linear and indexed attention; its exit is the mean of the streams."""
    from transformers.models.glm5_next.configuration_glm5_next import Glm5NextTextConfig
    from transformers.models.glm5_next.modeling_glm5_next import Glm5NextTextModel

    sizes = {
        **latent_sizes(),
        "qk_rope_head_dim": 0,
        "index_kpool": 2,
        "linear_head_dim": 8,
        "linear_num_heads": 2,
        "layer_types": ["linear_attention", "indexed_attention"],
    }
    config = Glm5NextTextConfig(**sizes | EPS | ITERATIONS | ENDS | changes)
    return drawn(Glm5NextTextModel, config)


def hy_v4(**changes):
    """A decoder whose res is the identity; its post has a magnitude and an epsilon."""
    from transformers.models.hy_v4.configuration_hy_v4 import HYV4Config
    from transformers.models.hy_v4.modeling_hy_v4 import HYV4Model

    sizes = {**latent_sizes(), "qk_rope_head_dim": 4, "hc_magnitude": 1.5}
    return drawn(HYV4Model, HYV4Config(**sizes | EPS | ENDS | changes))


def latent_sizes():
    return {
        "hidden_size": 32,
        "intermediate_size": 32,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "mlp_layer_types": ["dense", "sparse"],
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "index_topk": 4,
        "index_head_dim": 8,
        "index_n_heads": 2,
        "max_position_embeddings": 64,
    }


def drawn(kind, config):
    """A model with random weights; the maps of its connections have logits of order 1."""
    with warnings.catch_warnings(action="ignore"):
        model = kind(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = 0.5 if "hc" in name else 0.1 if parameter.ndim > 1 else 0
            if std:
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):
                buffer.copy_(torch.randint(4, buffer.shape, generator=generator))
    return model


def is_map(name):
    """True for a parameter of a connection or of a learned exit."""
    return "hc" in name.split(".")[-2]
