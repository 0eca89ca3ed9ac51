"""How many processes share a run, and how."""

import os
from dataclasses import dataclass
from math import prod
from typing import Literal

from manifold_hc.errors import ConfigError, require_at_least_one, require_number

AXES = ("pipeline", "replicate", "shard", "tensor")
"""The axes of the mesh of processes, the slowest one first."""

Placement = Literal["one", "loop", "v"]
"""Stages of process p of P: p alone; p, p + P and so on; p and 2P - 1 - p."""

SCHEDULES: dict[str, Placement] = {
    "GPipe": "one",
    "1F1B": "one",
    "LoopedBFS": "loop",
    "Interleaved1F1B": "loop",
    "InterleavedZeroBubble": "loop",
    "ZBVZeroBubble": "v",
    "DualPipeV": "v",
}
"""Schedules by the names of torch.distributed.pipelining, and where their stages are."""

SPLITTING = ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
"""Those that compute gradients of inputs and of weights apart."""


@dataclass(frozen=True)
class ParallelConfig:
    """Degrees of parallelism, whose product is the number of processes; 1 leaves an axis out."""

    pipeline: int = 1
    """Processes that share a copy's blocks, in stages of equal length."""
    schedule: str = "1F1B"
    """In which order microbatches (training.accumulate) go through the stages."""
    stages: int = 0
    """Stages that a process has; 0 for as few as the schedule takes, 1 or 2."""
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
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"schedule: must be {', '.join(SCHEDULES)} but is {self.schedule!r}")
        if self.pipeline > 1:
            self._require_stages()

    def _require_stages(self) -> None:
        fewest, more = self._fewest_stages, self.placement == "loop"
        if self.stages in (0, fewest) or (more and self.stages > fewest):
            return
        only = f"at least {fewest} with" if more else f"{fewest}, its only number with"
        raise ConfigError(
            f"stages: must be {only} {self.schedule}{'' if more else ','} or 0 for that "
            f"but is {self.stages}"
        )

    def __str__(self) -> str:
        """The axes that are used."""
        known = zip(AXES, self.degrees, strict=True)
        return " x ".join(f"{axis} {degree}" for axis, degree in known if degree > 1)

    @property
    def degrees(self) -> tuple[int, ...]:
        """Of every axis."""
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def size(self) -> int:
        """Processes in all."""
        return prod(self.degrees)

    @property
    def copies(self) -> int:
        """Processes that have the same blocks, or parts of them."""
        return self.size // self.pipeline

    @property
    def dp_size(self) -> int:
        """Parts of a batch that are computed at once."""
        return self.replicate * self.shard

    @property
    def placement(self) -> Placement:
        """Where the stages are."""
        return SCHEDULES[self.schedule]

    @property
    def all_stages(self) -> int:
        """Stages of all processes; 1 without a pipeline."""
        if self.pipeline == 1:
            return 1
        return self.pipeline * (self.stages or self._fewest_stages)

    @property
    def _fewest_stages(self) -> int:
        return 1 if self.placement == "one" else 2

    def stages_of(self, process: int) -> list[int]:
        """Which stages a process of the pipeline has, in the order of their layers."""
        if self.pipeline == 1:
            return [0]
        if self.placement == "v":
            return [process, self.all_stages - 1 - process]
        return list(range(process, self.all_stages, self.pipeline))

    def require_microbatches(self, count: int) -> None:
        """Raise ConfigError where the schedule cannot run on so many, with torch's own rules."""
        if self.pipeline == 1:
            return
        least = {"1F1B": self.pipeline, "DualPipeV": self.all_stages}.get(self.schedule, 1)
        if count < least:
            raise ConfigError(
                f"training.accumulate: {self.schedule} over {self.all_stages} stages needs at "
                f"least {least} microbatches but it is {count}"
            )
        rounds = max(1, count // self.pipeline)
        if self.schedule.startswith("Interleaved") and count % rounds:
            raise ConfigError(
                f"training.accumulate: {self.schedule} over {self.pipeline} processes needs a "
                f"multiple of {rounds} microbatches, such as {rounds * self.pipeline}, "
                f"but it is {count}"
            )


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
    raise ConfigError(
        f"parallel: {config} needs {config.size} processes but {started} "
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
