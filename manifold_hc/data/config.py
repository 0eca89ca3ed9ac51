"""Configuration of the data: sources, tokenizer, sequences."""

import math
from dataclasses import dataclass

from manifold_hc.errors import ConfigError, require_at_least_one
from manifold_hc.files import is_utf8


@dataclass(frozen=True)
class DataConfig:
    """Configuration of the training text and its sequences of tokens."""

    paths: tuple[str, ...] = ()
    """Sources: text, JSON lines, Parquet, folders, shards; none: Python's documentation."""
    weights: tuple[float, ...] = ()
    """Share of every source in the sequences; none: every sequence of all of them once an epoch."""
    tokenizer: str = ""
    """A tokenizer.json, or bytes; left out: the tokenizer of the shards, bytes for text."""
    boundary: str = ""
    """Token between documents; left out: the tokenizer's end of text, the byte 0 for bytes."""
    text_key: str = "text"
    """Key of the text in JSON lines, column of the text in Parquet."""
    skip_broken: bool = False
    """Count and leave out rows that cannot be read; the first one is an error otherwise."""
    sequence: int = 128
    """Tokens in a sequence."""
    verify: bool = True
    """Check the checksums of shards before training, a second or two a gigabyte."""
    mask_documents: bool = True
    """Restrict attention to a token's own document, if a sequence has several."""
    validation: float = 0.05
    """Share of every source, at its end, held out for validation."""

    def __post_init__(self) -> None:
        """Raise ConfigError for a value that is not valid."""
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
