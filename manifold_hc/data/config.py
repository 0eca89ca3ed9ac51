"""What a run reads: sources, tokenizer, sequences."""

import math
from dataclasses import dataclass

from manifold_hc.errors import ConfigError, require_at_least_one
from manifold_hc.files import is_utf8


@dataclass(frozen=True)
class DataConfig:
    """The training text and how it becomes sequences of tokens."""

    paths: tuple[str, ...] = ()
    """Sources: text, JSON lines, Parquet, folders, shards; none: Python's documentation."""
    weights: tuple[float, ...] = ()
    """Share of every source in the sequences; none: every sequence of all of them once an epoch."""
    tokenizer: str = ""
    """A tokenizer.json, or bytes; left out: what shards were made with, bytes for text."""
    boundary: str = ""
    """Token between documents; left out: the tokenizer's end of text, the byte 0 for bytes."""
    text_key: str = "text"
    """Key of the text in JSON lines, column of the text in Parquet."""
    skip_broken: bool = False
    """Whether rows that cannot be read are counted and left out, instead of ending the run."""
    sequence: int = 128
    """Tokens in a sequence."""
    verify: bool = True
    """Whether shards are held against their checksums first, a second or two a gigabyte."""
    mask_documents: bool = True
    """Whether a token attends to its own document only, where a sequence holds several."""
    validation: float = 0.05
    """Share of every source, at its end, that is held out."""

    def __post_init__(self) -> None:
        """Raise ConfigError for values that cannot be used."""
        require_at_least_one(self, "sequence")
        for key in ("paths", "tokenizer", "boundary", "text_key"):
            value = getattr(self, key)
            for text in value if isinstance(value, tuple) else (value,):
                if not is_utf8(text):
                    raise ConfigError(
                        f"{key}: {text!r} is not valid UTF-8; rename the file or the key"
                    )
        if not 0 < self.validation < 1:
            raise ConfigError(f"validation: must be between 0 and 1 but is {self.validation}")
        if self.weights and len(self.weights) != len(self.paths):
            raise ConfigError(
                f"weights: must be one for every source, {len(self.paths)}, "
                f"but are {len(self.weights)}"
            )
        if not all(math.isfinite(weight) and weight > 0 for weight in self.weights):
            raise ConfigError(f"weights: must be numbers above 0 but are {self.weights}")
