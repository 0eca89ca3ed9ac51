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
from manifold_hc.training.initial_weights import InitialWeights, initial_config
from manifold_hc.training.launch import run
from manifold_hc.training.metrics import Observer
from manifold_hc.training.preflight import check, require_memory
from manifold_hc.training.presets import PRESETS, preset
from manifold_hc.training.trainer import train
from manifold_hc.training.weight_search import find_weights

__all__ = [
    "PRESETS",
    "CheckpointConfig",
    "Checkpoints",
    "InitialWeights",
    "Observer",
    "OptimizerConfig",
    "RunConfig",
    "RunFolder",
    "TrainingConfig",
    "check",
    "find_weights",
    "initial_config",
    "preset",
    "require_memory",
    "run",
    "train",
]
