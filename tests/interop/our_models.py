"""Small models of ours, as models of transformers, for the tests."""

import warnings

import torch
from safetensors.torch import load_file, save_file

from manifold_hc.config import ConnectionConfig
from manifold_hc.models import AttentionConfig, DecoderConfig, ExpertsConfig

with warnings.catch_warnings(action="ignore"):
    from manifold_hc.interop.huggingface import ManifoldConfig, ManifoldForCausalLM

V = 50
ATTENTION = AttentionConfig(heads=3, head_size=8, rotary_size=4, latent_size=10, theta=50.0)
MODELS = {
    "residual": (ConnectionConfig(kind="residual"), 0),
    "hc": (ConnectionConfig(kind="hc", phi_std=0.3), 0),
    "mhc": (ConnectionConfig(phi_std=0.3), 0),
    "deepseek_v4": (ConnectionConfig(numerics="deepseek_v4", phi_std=0.3), 0),
    "deepseek_v41": (ConnectionConfig(numerics="deepseek_v41", phi_std=0.3), 0),
    "experts": (ConnectionConfig(phi_std=0.3), 4),
}


def model(name="mhc", vocabulary=V):
    connection, routed = MODELS[name]
    config = DecoderConfig(
        vocabulary=vocabulary,
        channels=24,
        blocks=2,
        feed_forward=40,
        init_std=0.3,
        attention=ATTENTION,
        experts=ExpertsConfig(routed=routed, width=16),
    )
    return ManifoldForCausalLM(ManifoldConfig(model=config, connection=connection)).eval()


def tokens(rows=2, length=7):
    return torch.randint(0, V, (rows, length))


def generate(model, prompt, **options):
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)


def damage(folder, change):
    """Change the tensors of a saved model."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
