"""Settings of torchtitan that the connections do not support."""

from typing import Any

from manifold_hc.config import ConnectionConfig
from manifold_hc.errors import ConfigError


def require_supported(connection: ConnectionConfig, parallelism: Any) -> None:
    """Raise ConfigError for parallelism that the connections do not support.

    parallelism: torchtitan's ParallelismConfig.
    """
    if parallelism.tensor_parallel_degree > 1:
        raise ConfigError(
            "parallelism.tensor_parallel_degree: must be 1 with connections but is "
            f"{parallelism.tensor_parallel_degree}; use data, expert and pipeline parallelism"
        )
    if parallelism.spmd_backend != "partial_dtensor":
        raise ConfigError(
            "parallelism.spmd_backend: must be partial_dtensor with connections but is "
            f"{parallelism.spmd_backend}; their parameters are plain tensors before sharding"
        )
    if connection.is_single_pass and parallelism.pipeline_parallel_degree > 1:
        raise ConfigError(
            "parallelism.pipeline_parallel_degree: must be 1 with single_pass but is "
            f"{parallelism.pipeline_parallel_degree}; a stage of torchtitan sends one tensor"
        )
