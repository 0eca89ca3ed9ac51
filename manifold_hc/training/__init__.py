"""Training of language models with any kind of connection."""

from manifold_hc.extras import require_train

require_train("manifold_hc.training")

from manifold_hc.training.checkpoint import Checkpoints
from manifold_hc.training.config import (
    CheckpointConfig,
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
)
from manifold_hc.training.folder import RunFolder
from manifold_hc.training.launch import run
from manifold_hc.training.metrics import Observer
from manifold_hc.training.preflight import check, require_memory
from manifold_hc.training.presets import PRESETS, preset
from manifold_hc.training.trainer import train

__all__ = [
    "PRESETS",
    "CheckpointConfig",
    "Checkpoints",
    "Observer",
    "OptimizerConfig",
    "RunConfig",
    "RunFolder",
    "TrainingConfig",
    "check",
    "preset",
    "require_memory",
    "run",
    "train",
]
