"""How many processes share a run, and how."""

import os
from dataclasses import dataclass
from math import prod

from manifold_hc.errors import ConfigError, require_at_least_one, require_number

AXES = ("replicate", "shard", "tensor")
"""The axes of the mesh of processes, the slowest one first."""


@dataclass(frozen=True)
class ParallelConfig:
    """Degrees of parallelism, whose product is the number of processes; 1 leaves an axis out."""

    replicate: int = 1
    """Copies of the whole model, each with its own part of every batch."""
    shard: int = 1
    """Processes that share a copy's weights and optimizer state (FSDP2); each has its own part."""
    tensor: int = 1
    """Processes that share every branch's heads and hidden units, and every sequence."""
    experts: int = 1
    """Processes among `shard` x `tensor` that share the experts: tokens travel there and back."""
    timeout: float = 600.0
    """Seconds without progress after which several processes end and name who hangs."""

    def __post_init__(self) -> None:
        """Raise ConfigError for degrees that there are not."""
        require_at_least_one(self, *AXES, "experts")
        if self.shard * self.tensor % self.experts:
            raise ConfigError(
                f"experts: must divide shard x tensor = {self.shard * self.tensor} "
                f"but is {self.experts}"
            )
        require_number(self, "timeout", positive=True)

    @property
    def degrees(self) -> tuple[int, ...]:
        """Of every axis."""
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def size(self) -> int:
        """Processes in all."""
        return prod(self.degrees)

    @property
    def parts(self) -> int:
        """Parts of a batch that are computed at once."""
        return self.replicate * self.shard


def require_started(config: ParallelConfig) -> None:
    """Raise ConfigError unless as many processes were started as the axes need."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started == config.size:
        return
    if config.size == 1:
        raise ConfigError(
            f"parallel: {started} processes were started but nothing says how they share the run; "
            f"give degrees that multiply to {started}, such as parallel.shard={started}"
        )
    known = zip(AXES, config.degrees, strict=True)
    product = " x ".join(f"{axis} {degree}" for axis, degree in known if degree > 1)
    raise ConfigError(
        f"parallel: {product} needs {config.size} processes but {started} "
        f"{'was' if started == 1 else 'were'} started; start {config.size} with "
        f"torchrun --nproc-per-node {config.size} -m manifold_hc train ..., "
        f"or give degrees that multiply to {started}"
    )


def is_first() -> bool:
    """Whether this process is the one that speaks, by what torchrun has told it."""
    return os.environ.get("RANK", "0") == "0"


def is_restarted() -> bool:
    """Whether torchrun has started this process again after a failure of its own node's."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def job() -> str:
    """What tells this job of torchrun's from others, the same after a restart."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return name if name != "none" else f"child of {os.getppid()}"
