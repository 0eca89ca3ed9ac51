"""Configuration of a run: one tree, each key usable as `key=value` on the command line."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

import torch

from manifold_hc.config import ConnectionConfig
from manifold_hc.data import DataConfig
from manifold_hc.errors import ConfigError, require_at_least_one, require_number, shown
from manifold_hc.files import is_utf8
from manifold_hc.models import DecoderConfig
from manifold_hc.parallel.config import SPLIT_BACKWARD, ParallelConfig
from manifold_hc.training.size import require_possible

LARGEST_SEED = 2**32 - 1


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rate; defaults as in the mHC paper except for lr and warmup."""

    lr: float = 4e-3
    """Base learning rate."""
    warmup: int = 50
    """Steps of linear warm-up."""
    schedule: Literal["step", "cosine", "constant"] = "step"
    """Schedule after warm-up: the paper's two steps down, a cosine to a tenth, or constant."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the two moments."""
    eps: float = 1e-20
    """Epsilon added to the root of the second moment."""
    weight_decay: float = 0.1
    """Weight decay of matrices; norms, gates and static coefficients have none."""
    clip: float = 1.0
    """Largest norm of the whole gradient; 0 turns clipping off."""

    def __post_init__(self) -> None:
        """Raise ConfigError for invalid values."""
        require_number(self, "lr", positive=True)
        require_number(self, "warmup", "eps", "weight_decay", "clip")
        if self.schedule not in ("step", "cosine", "constant"):
            raise ConfigError(
                f"schedule: must be step, cosine or constant but is {self.schedule!r}"
            )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas: must be two numbers from 0 to below 1 but are {self.betas}")


@dataclass(frozen=True)
class TrainingConfig:
    """Length of a run, its precision, and how often it is measured."""

    steps: int = 300
    """Number of optimizer steps."""
    batch: int = 8
    """Sequences per step."""
    accumulate: int = 1
    """Microbatches per step of each data-parallel rank; their gradients are accumulated."""
    recompute: int | Literal["none", "auto"] = "none"
    """Sublayers per recompute block: none, auto for the least memory, or a number."""
    compile: bool = False
    """Apply torch.compile to dense branches and shared experts; slow to start."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Dtype of matrix products and streams; weights stay in float32."""
    seed: int = 0
    """Seed of the initial weights and of the data order."""
    validate_every: int = 100
    """Steps between validations; the last step is always validated."""
    validation_batches: int = 20
    """Batches per validation, the same ones every time."""
    probe_every: int = 10
    """Steps between measurements of the stability figures."""
    device: str = "auto"
    """Device: auto, cpu, cuda or mps."""
    tensorboard: bool = False
    """Write the metrics to `tensorboard` in the run folder as well."""

    def __post_init__(self) -> None:
        """Raise ConfigError for invalid values."""
        require_at_least_one(
            self, "steps", "batch", "accumulate", "validate_every", "validation_batches"
        )
        require_at_least_one(self, "probe_every")
        if self.batch % self.accumulate:
            raise ConfigError(
                f"accumulate: must divide batch={self.batch} but is {self.accumulate}"
            )
        if self.precision not in ("float32", "bfloat16"):
            raise ConfigError(f"precision: must be float32 or bfloat16 but is {self.precision!r}")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise ConfigError(f"seed: must be from 0 to {LARGEST_SEED} but is {self.seed}")
        if self.device not in ("auto", "cpu", "cuda", "mps"):
            raise ConfigError(f"device: must be auto, cpu, cuda or mps but is {self.device!r}")

    @property
    def torch_precision(self) -> torch.dtype:
        """Dtype of matrix products and streams, as torch names it."""
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints: how many steps a crash can lose."""

    every: int = 500
    """Steps between checkpoints; the last step always has one."""
    keep: int = 2
    """Number of newest checkpoints to keep."""
    best: bool = True
    """Also write and keep the checkpoint with the lowest validation loss."""
    asynchronous: bool = False
    """Write checkpoints in the background; needs memory for a second copy of the state."""

    def __post_init__(self) -> None:
        """Raise ConfigError for invalid values."""
        require_at_least_one(self, "every", "keep")


@dataclass(frozen=True)
class RunConfig:
    """Configuration of a run; it determines the result."""

    model: DecoderConfig = field(default_factory=DecoderConfig)
    """Sizes of the decoder."""
    connection: ConnectionConfig = field(default_factory=ConnectionConfig)
    """Connections between the sublayers."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training text."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and its learning rate."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """The budget of the run."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints: how many steps a crash can lose."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Degrees of parallelism."""

    def __post_init__(self) -> None:
        """Raise ConfigError for sections that contradict each other, or that JSON cannot hold."""
        for key, value in leaves(self):
            _require_storable(key, value)
        require_possible(self.model, self.connection)
        experts, degree = self.model.experts.routed, self.parallel.experts
        if degree > 1 and (experts == 0 or experts % degree):
            raise ConfigError(
                f"parallel.experts: must divide model.experts.routed={experts} but is {degree}"
            )
        sizes = {
            "data.sequence": self.data.sequence,
            "model.attention.heads": self.model.attention.heads,
            "model.feed_forward": self.model.feed_forward,
        }
        for name, size in sizes.items():
            if size % self.parallel.tensor:
                raise ConfigError(
                    f"parallel.tensor: must divide {name}={size} but is {self.parallel.tensor}"
                )
        slices = self.parallel.dp_size * self.training.accumulate
        if self.training.batch % slices:
            raise ConfigError(
                f"training.batch: must be a multiple of {slices}, parallel.replicate x "
                f"parallel.shard x training.accumulate, but is {self.training.batch}"
            )
        self._require_stages()

    def _require_stages(self) -> None:
        """Raise ConfigError for numbers of blocks and microbatches that do not fit the pipeline."""
        parallel, training, blocks = self.parallel, self.training, self.model.blocks
        stages = parallel.num_stages
        if blocks % stages:
            raise ConfigError(
                f"model.blocks: must be a multiple of {stages}, the stages of "
                f"parallel.pipeline={parallel.pipeline} with {parallel.schedule}, but is {blocks}"
            )
        parallel.require_microbatches(training.accumulate)
        length = 2 * blocks // stages
        if isinstance(training.recompute, int) and training.recompute > length:
            raise ConfigError(
                f"training.recompute: must be at most {length}, the sublayers of "
                f"{'a stage' if stages > 1 else 'the model'}, but is {training.recompute}"
            )
        splits = stages > 1 and parallel.schedule in SPLIT_BACKWARD
        # A static bias enters a sublayer twice; torch then splits the backward graph wrongly.
        static = self.connection.kind != "residual" and not self.connection.dynamic
        for name, wanted in {
            "training.compile": training.compile,
            "connection.dynamic=false": static,
        }.items():
            if splits and wanted:
                raise ConfigError(
                    f"{name}: cannot go with parallel.schedule={parallel.schedule}, which "
                    "computes gradients of inputs and of weights in two passes; "
                    "take 1F1B or Interleaved1F1B"
                )


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (key, value) for every key of a configuration, or of a section of it."""
    for member in fields(config):
        key, value = f"{prefix}{member.name}", getattr(config, member.name)
        if is_dataclass(value):
            yield from leaves(value, f"{key}.")
        else:
            yield key, value


def _require_storable(key: str, value: Any) -> None:
    """Raise ConfigError for a value that config.json or a file name cannot hold."""
    for item in value if isinstance(value, tuple) else (value,):
        if isinstance(item, int) and not -(2**63) <= item < 2**63:
            raise ConfigError(f"{key}: must fit into 64 bits but is {shown(item)}")
        if isinstance(item, str) and ("\0" in item or not is_utf8(item)):
            raise ConfigError(f"{key}: must be UTF-8 without the character 0 but is {item!r}")


FIXED = ("model", "connection", "data", "training.seed")
"""Sections and keys that must not change in a resumed run: they determine weights and data."""

FREE = ("connection.backend", "data.paths", "data.verify")
"""Exceptions to FIXED: they do not change the result, or the digest of the data checks them."""


def differences(one: Any, other: Any, prefix: str = "") -> list[str]:
    """Return the keys in which two configurations, or sections of them, differ."""
    found = []
    for member in fields(one):
        key = f"{prefix}{member.name}"
        a, b = getattr(one, member.name), getattr(other, member.name)
        if is_dataclass(a):
            found += differences(a, b, f"{key}.")
        elif a != b:
            found.append(key)
    return found


def fixed_differences(one: RunConfig, other: RunConfig) -> list[str]:
    """Return the keys that differ although a resumed run must not change them."""
    return [
        key
        for key in differences(one, other)
        if key not in FREE and any(key == fixed or key.startswith(f"{fixed}.") for fixed in FIXED)
    ]
