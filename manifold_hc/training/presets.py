"""Presets: small configurations for experiments, and the models of the mHC paper.

Sizes and recipes are those of arXiv 2512.24880, appendix. The paper gives no initial standard
deviation and no step size of the balancing bias; 0.006 and 0.001 are from DeepSeek-V3
(arXiv 2412.19437).
"""

from collections.abc import Mapping

from manifold_hc.data import DataConfig
from manifold_hc.errors import ConfigError
from manifold_hc.models import AttentionConfig, DecoderConfig, ExpertsConfig
from manifold_hc.training.config import (
    CheckpointConfig,
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
)


def _paper(
    *,
    channels: int,
    blocks: int,
    heads: int,
    width: int,
    routed: int,
    batch: int,
    steps: int,
    lr: float,
) -> RunConfig:
    """Configuration of one model of the paper; arguments are the columns of its table."""
    experts = ExpertsConfig(routed=routed, active=6, shared=2, width=width)
    return RunConfig(
        model=DecoderConfig(
            vocabulary=129280,
            channels=channels,
            blocks=blocks,
            feed_forward=(experts.active + experts.shared) * width,
            init_std=0.006,
            attention=AttentionConfig(heads=heads, head_size=128, rotary_size=64, latent_size=512),
            experts=experts,
        ),
        data=DataConfig(sequence=4096, validation=0.001),
        optimizer=OptimizerConfig(lr=lr, warmup=2000),
        training=TrainingConfig(
            steps=steps,
            batch=batch,
            accumulate=batch,
            precision="bfloat16",
            validate_every=1000,
            probe_every=100,
        ),
        checkpoint=CheckpointConfig(every=1000),
    )


_SMALLEST = dict(channels=1280, blocks=12, heads=16, width=896, routed=64)

PRESETS: Mapping[str, RunConfig] = {
    "tiny": RunConfig(),
    "tiny-moe": RunConfig(
        model=DecoderConfig(
            blocks=4,
            experts=ExpertsConfig(routed=16, active=2, shared=1, width=64, balancing=0.01),
        ),
    ),
    "small": RunConfig(
        model=DecoderConfig(
            vocabulary=32768,
            channels=640,
            blocks=12,
            feed_forward=1792,
            attention=AttentionConfig(heads=10, head_size=64, rotary_size=32, latent_size=256),
        ),
        data=DataConfig(sequence=1024, validation=0.01),
        optimizer=OptimizerConfig(lr=1e-3, warmup=500),
        training=TrainingConfig(
            steps=20_000, batch=64, accumulate=8, precision="bfloat16", validate_every=500
        ),
    ),
    "3b": _paper(**_SMALLEST, batch=320, steps=30_000, lr=8.6e-4),
    "9b": _paper(
        channels=1920, blocks=18, heads=24, width=1280, routed=64,
        batch=512, steps=50_000, lr=5.9e-4,
    ),
    "27b": _paper(
        channels=2560, blocks=30, heads=32, width=1536, routed=72,
        batch=1280, steps=50_000, lr=4.0e-4,
    ),
    "3b-long": _paper(**_SMALLEST, batch=2560, steps=100_000, lr=9.0e-4),
}  # fmt: skip
"""Presets by name; `tiny` is the default, `small` has about 100 million parameters."""


def preset(name: str) -> RunConfig:
    """Return the preset called `name`; raise ConfigError for an unknown name."""
    if name not in PRESETS:
        raise ConfigError(f"preset: must be one of {', '.join(PRESETS)} but is {name!r}")
    return PRESETS[name]
