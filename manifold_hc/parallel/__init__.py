"""Runs of several processes: who they are, what each has, what they tell each other."""

from manifold_hc.parallel.apply import distribute
from manifold_hc.parallel.config import (
    ParallelConfig,
    is_first,
    is_restarted,
    job,
    require_started,
)
from manifold_hc.parallel.pipeline import Pipeline, in_depth_order
from manifold_hc.parallel.processes import Processes, by_mesh, joined, local

__all__ = [
    "ParallelConfig",
    "Pipeline",
    "Processes",
    "by_mesh",
    "distribute",
    "in_depth_order",
    "is_first",
    "is_restarted",
    "job",
    "joined",
    "local",
    "require_started",
]
