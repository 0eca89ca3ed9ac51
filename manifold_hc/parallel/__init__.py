"""Distributed runs: ranks, meshes, sharding, pipelines and the watchdog."""

from manifold_hc.parallel.apply import distribute
from manifold_hc.parallel.config import ParallelConfig
from manifold_hc.parallel.mesh import local_shard, parameters_by_mesh
from manifold_hc.parallel.pipeline import Pipeline, in_depth_order
from manifold_hc.parallel.processes import Processes
from manifold_hc.parallel.rendezvous import join_process_group
from manifold_hc.parallel.torchrun import (
    end_process,
    is_rank0,
    is_restarted,
    job_id,
    require_world_size,
)

__all__ = [
    "ParallelConfig",
    "Pipeline",
    "Processes",
    "distribute",
    "end_process",
    "in_depth_order",
    "is_rank0",
    "is_restarted",
    "job_id",
    "join_process_group",
    "local_shard",
    "parameters_by_mesh",
    "require_world_size",
]
