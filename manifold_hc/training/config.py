"""The configuration of a run: one tree, every key usable as `key=value` on the command line."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

import torch

from manifold_hc.config import ConnectionConfig
from manifold_hc.data import DataConfig
from manifold_hc.errors import ConfigError, require_at_least_one, require_number, shown
from manifold_hc.files import is_utf8
from manifold_hc.models import DecoderConfig
from manifold_hc.parallel.config import SPLITTING, ParallelConfig
from manifold_hc.training.size import require_possible

LARGEST_SEED = 2**32 - 1


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rate; defaults as in the mHC paper but for the rate and warm-up."""

    lr: float = 4e-3
    """Base learning rate."""
    warmup: int = 50
    """Steps of linear warm-up."""
    schedule: Literal["step", "cosine", "constant"] = "step"
    """After warm-up: the paper's two steps down, a cosine to a tenth, or nothing."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the two moments."""
    eps: float = 1e-20
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decay of matrices; norms, gates and static coefficients have none."""
    clip: float = 1.0
    """Largest norm of the whole gradient; 0 leaves it alone."""

    def __post_init__(self) -> None:
        """Raise ConfigError for values that cannot be used."""
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
    """The budget of a run and how often it is looked at."""

    steps: int = 300
    """Optimizer steps."""
    batch: int = 8
    """Sequences in a step."""
    accumulate: int = 1
    """Pieces in which a step's batch goes through the model; a pipeline's microbatches."""
    recompute: int | Literal["none", "auto"] = "none"
    """Sublayers a block whose streams backward rebuilds: none, auto for the best, or a number."""
    compile: bool = False
    """Whether torch.compile takes dense branches and shared experts; slow to start."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What matrix products and streams are computed in; weights stay in float32."""
    seed: int = 0
    """Seed of the initial weights and of the order of the data."""
    validate_every: int = 100
    """Steps between validations; there is always one at the end."""
    validation_batches: int = 20
    """Batches in a validation, the same every time."""
    probe_every: int = 10
    """Steps between two looks at the stability figures."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    tensorboard: bool = False
    """Whether the figures also go to the run folder's `tensorboard`."""

    def __post_init__(self) -> None:
        """Raise ConfigError for values that cannot be used."""
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
        """What matrix products and streams are computed in."""
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32


@dataclass(frozen=True)
class CheckpointConfig:
    """How much of a run a crash can take."""

    every: int = 500
    """Steps between two checkpoints; there is always one at the end."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    best: bool = True
    """Whether the one with the lowest validation loss is made and kept too."""
    asynchronous: bool = False
    """Whether they are written while training goes on; takes a second copy of the state."""

    def __post_init__(self) -> None:
        """Raise ConfigError for values that cannot be used."""
        require_at_least_one(self, "every", "keep")


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run computes."""

    model: DecoderConfig = field(default_factory=DecoderConfig)
    """Sizes of the decoder."""
    connection: ConnectionConfig = field(default_factory=ConnectionConfig)
    """What joins its sublayers."""
    data: DataConfig = field(default_factory=DataConfig)
    """The training text."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and its learning rate."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """The budget of the run."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """How much of it a crash can take."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How many processes share it."""

    def __post_init__(self) -> None:
        """Raise ConfigError for sections that do not go together, or cannot be saved."""
        for key, value in leaves(self):
            _require_storable(key, value)
        require_possible(self.model, self.connection)
        experts, sharing = self.model.experts.routed, self.parallel.experts
        if sharing > 1 and (experts == 0 or experts % sharing):
            raise ConfigError(
                f"parallel.experts: must divide model.experts.routed={experts} but is {sharing}"
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
        pieces = self.parallel.dp_size * self.training.accumulate
        if self.training.batch % pieces:
            raise ConfigError(
                f"training.batch: must be a multiple of {pieces}, parallel.replicate x "
                f"parallel.shard x training.accumulate, but is {self.training.batch}"
            )
        self._require_stages()

    def _require_stages(self) -> None:
        """Raise ConfigError for blocks and microbatches that a pipeline cannot take."""
        parallel, training, blocks = self.parallel, self.training, self.model.blocks
        stages = parallel.all_stages
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
        splits = stages > 1 and parallel.schedule in SPLITTING
        # A static bias is used twice in a sublayer; torch then loses what lies between.
        static = self.connection.kind != "residual" and not self.connection.dynamic
        for name, wanted in {
            "training.compile": training.compile,
            "connection.dynamic=false": static,
        }.items():
            if splits and wanted:
                raise ConfigError(
                    f"{name}: cannot go with parallel.schedule={parallel.schedule}, which "
                    "computes gradients of inputs and of weights apart; "
                    "take 1F1B or Interleaved1F1B"
                )


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of every key of a configuration, or of a section of it."""
    for member in fields(config):
        key, value = f"{prefix}{member.name}", getattr(config, member.name)
        if is_dataclass(value):
            yield from leaves(value, f"{key}.")
        else:
            yield key, value


def _require_storable(key: str, value: Any) -> None:
    """Raise ConfigError for a value that `config.json` cannot hold, or that names no file."""
    for item in value if isinstance(value, tuple) else (value,):
        if isinstance(item, int) and not -(2**63) <= item < 2**63:
            raise ConfigError(f"{key}: must fit into 64 bits but is {shown(item)}")
        if isinstance(item, str) and ("\0" in item or not is_utf8(item)):
            raise ConfigError(f"{key}: must be UTF-8 without the character 0 but is {item!r}")


FIXED = ("model", "connection", "data", "training.seed")
"""What a run keeps when it goes on: sections and keys that decide on its weights and its data."""

FREE = ("connection.backend", "data.paths", "data.verify")
"""Keys in these sections that it need not keep: results or the data's digest say the same."""


def differences(one: Any, other: Any, prefix: str = "") -> list[str]:
    """Keys in which two configurations, or sections of them, differ."""
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
    """Keys in which two configurations differ though a run must keep them when it goes on."""
    return [
        key
        for key in differences(one, other)
        if key not in FREE and any(key == fixed or key.startswith(f"{fixed}.") for fixed in FIXED)
    ]
