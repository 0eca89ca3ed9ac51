"""One trainer for every kind of connection."""

from manifold_hc.training.config import OptimizerConfig, RunConfig, TextConfig, TrainingConfig
from manifold_hc.training.folder import RunFolder
from manifold_hc.training.trainer import Observer, check, train

__all__ = [
    "Observer",
    "OptimizerConfig",
    "RunConfig",
    "RunFolder",
    "TextConfig",
    "TrainingConfig",
    "check",
    "train",
]
