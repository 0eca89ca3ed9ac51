"""The configuration of a run: one tree, every key usable as `key=value` on the command line."""

from dataclasses import dataclass, field
from typing import Literal

from manifold_hc.connection import ConnectionConfig
from manifold_hc.errors import ConfigError, require_at_least_one, require_number
from manifold_hc.models import DecoderConfig

LARGEST_SEED = 2**32 - 1


@dataclass(frozen=True)
class TextConfig:
    """The training text; its bytes are the tokens."""

    path: str = ""
    """UTF-8 text file; Python's own documentation when left out."""
    sequence: int = 128
    """Tokens in a sequence."""
    validation: float = 0.05
    """Share of the text, at its end, that is held out."""

    def __post_init__(self) -> None:
        """Raise ConfigError for values that cannot be used."""
        require_at_least_one(self, "sequence")
        if not 0 < self.validation < 1:
            raise ConfigError(f"validation: must be between 0 and 1 but is {self.validation}")


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
    """Sequences in a batch."""
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

    def __post_init__(self) -> None:
        """Raise ConfigError for values that cannot be used."""
        require_at_least_one(
            self, "steps", "batch", "validate_every", "validation_batches", "probe_every"
        )
        if not 0 <= self.seed <= LARGEST_SEED:
            raise ConfigError(f"seed: must be from 0 to {LARGEST_SEED} but is {self.seed}")
        if self.device not in ("auto", "cpu", "cuda", "mps"):
            raise ConfigError(f"device: must be auto, cpu, cuda or mps but is {self.device!r}")


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run computes."""

    model: DecoderConfig = field(default_factory=DecoderConfig)
    """Sizes of the decoder."""
    connection: ConnectionConfig = field(default_factory=ConnectionConfig)
    """What joins its sublayers."""
    data: TextConfig = field(default_factory=TextConfig)
    """The training text."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and its learning rate."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """The budget of the run."""

    def __post_init__(self) -> None:
        """Raise ConfigError for parts that do not fit one another."""
        if self.model.vocabulary < 256:
            raise ConfigError(
                f"model.vocabulary: bytes need at least 256 but it is {self.model.vocabulary}"
            )
