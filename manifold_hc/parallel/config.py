"""Degrees of parallelism, and the stages of a pipeline."""

from dataclasses import dataclass
from math import prod
from typing import Literal

from manifold_hc.errors import ConfigError, require_at_least_one, require_number

AXES = ("pipeline", "replicate", "shard", "tensor")
"""Axes of the mesh of ranks, outermost first: ranks of one tensor group are neighbours."""

Placement = Literal["one", "loop", "v"]
"""Stages of pipeline rank p of P: p alone; p, p + P, p + 2P, ...; p and 2P - 1 - p."""

SCHEDULES: dict[str, Placement] = {
    "GPipe": "one",
    "1F1B": "one",
    "LoopedBFS": "loop",
    "Interleaved1F1B": "loop",
    "InterleavedZeroBubble": "loop",
    "ZBVZeroBubble": "v",
    "DualPipeV": "v",
}
"""Placement of stages by schedule, under the names of torch.distributed.pipelining."""

SPLIT_BACKWARD = ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
"""Schedules that compute gradients of inputs and of weights in two backward passes."""


@dataclass(frozen=True)
class ParallelConfig:
    """Degrees of parallelism; their product is the number of processes, 1 leaves an axis unused."""

    pipeline: int = 1
    """Pipeline ranks, which hold stages of equal length."""
    schedule: str = "1F1B"
    """Schedule of the microbatches (training.accumulate) through the stages."""
    stages: int = 0
    """Stages per pipeline rank; 0 for the fewest that the schedule takes, 1 or 2."""
    replicate: int = 1
    """Replicas of the whole model, each with its own slice of every batch."""
    shard: int = 1
    """Ranks that shard weights and optimizer state (FSDP2), each with its own slice of a batch."""
    tensor: int = 1
    """Ranks that shard the heads and hidden units of every branch, and every sequence."""
    experts: int = 1
    """Ranks among `shard` x `tensor` that shard the experts and exchange tokens."""
    timeout: float = 600.0
    """Seconds without progress after which the watchdog ends the run and names the hanging rank."""

    def __post_init__(self) -> None:
        """Raise ConfigError for invalid degrees."""
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
        """Return the axes of degree above 1, as "pipeline 2 x shard 4"."""
        known = zip(AXES, self.degrees, strict=True)
        return " x ".join(f"{axis} {degree}" for axis, degree in known if degree > 1)

    @property
    def degrees(self) -> tuple[int, ...]:
        """Degree of every axis, in the order of AXES."""
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def size(self) -> int:
        """Number of processes (world size)."""
        return prod(self.degrees)

    @property
    def stage_ranks(self) -> int:
        """Number of ranks per pipeline rank: all hold the same layers, or shards of them."""
        return self.size // self.pipeline

    @property
    def dp_size(self) -> int:
        """Data-parallel size: number of slices of a batch that are computed at once."""
        return self.replicate * self.shard

    @property
    def placement(self) -> Placement:
        """Placement of the stages on pipeline ranks."""
        return SCHEDULES[self.schedule]

    @property
    def num_stages(self) -> int:
        """Number of stages of the whole pipeline; 1 without a pipeline."""
        if self.pipeline == 1:
            return 1
        return self.pipeline * (self.stages or self._fewest_stages)

    @property
    def _fewest_stages(self) -> int:
        return 1 if self.placement == "one" else 2

    def stages_of(self, pp_rank: int) -> list[int]:
        """Return the stages of a pipeline rank, in depth order."""
        if self.pipeline == 1:
            return [0]
        if self.placement == "v":
            return [pp_rank, self.num_stages - 1 - pp_rank]
        return list(range(pp_rank, self.num_stages, self.pipeline))

    def require_microbatches(self, count: int) -> None:
        """Raise ConfigError if the schedule cannot run `count` microbatches, by torch's rules."""
        if self.pipeline == 1:
            return
        # torch checks the same when it builds the schedule, but after the processes have joined.
        least = {"1F1B": self.pipeline, "DualPipeV": self.num_stages}.get(self.schedule, 1)
        if count < least:
            raise ConfigError(
                f"training.accumulate: {self.schedule} over {self.num_stages} stages needs at "
                f"least {least} microbatches but it is {count}"
            )
        # Interleaved schedules run microbatches in equal rounds, about one per pipeline rank.
        rounds = max(1, count // self.pipeline)
        if self.schedule.startswith("Interleaved") and count % rounds:
            raise ConfigError(
                f"training.accumulate: {self.schedule} over {self.pipeline} processes needs a "
                f"multiple of {rounds} microbatches, such as {rounds * self.pipeline}, "
                f"but it is {count}"
            )
