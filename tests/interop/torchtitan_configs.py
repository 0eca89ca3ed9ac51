"""A tiny model: `--module tests.interop.torchtitan_configs --config tiny`."""

from torchtitan.protocols.model_spec import ModelSpec

from manifold_hc.interop.torchtitan import ConnectedTrainer
from manifold_hc.interop.torchtitan.config_registry import deepseek_v3_mhc_debug
from manifold_hc.interop.torchtitan.sizes import paper_spec
from manifold_hc.models import AttentionConfig, DecoderConfig, ExpertsConfig

TINY = DecoderConfig(
    vocabulary=320,
    channels=64,
    blocks=4,
    feed_forward=128,
    attention=AttentionConfig(heads=2, head_size=32, rotary_size=16, latent_size=32),
    experts=ExpertsConfig(routed=8, active=3, shared=1, width=32),
)


def tiny_spec() -> ModelSpec:
    """torchtitan's own model, with residual connections."""
    return paper_spec("tiny", TINY, sequence=64)


def tiny() -> ConnectedTrainer.Config:
    """The debug run of mHC with a tiny model."""
    config = deepseek_v3_mhc_debug()
    config.model_spec = tiny_spec()
    config.__post_init__()
    return config
