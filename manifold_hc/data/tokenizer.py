"""Text to token ids: bytes, or any tokenizer.json."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from manifold_hc.errors import ConfigError, DataError

END_OF_TEXT = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "<|im_end|>",
    "[SEP]",
)
"""Names under which tokenizers keep the end of a text; the first found is the boundary."""


class Tokenizer(ABC):
    """What turns documents into ids."""

    name: str
    """For messages: bytes, or a path."""
    fingerprint: str
    """Equal for tokenizers that give equal ids: bytes, or the SHA-256 of the file."""
    vocabulary: int
    """Largest id + 1."""
    boundary: int | None
    """The id between documents; None where the tokenizer has no such token."""
    source: bytes
    """The content of tokenizer.json; empty for bytes."""

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids [N] of every text, without special tokens."""


class ByteTokenizer(Tokenizer):
    """The bytes of UTF-8; the byte 0, which no text holds, is the boundary."""

    name = fingerprint = "bytes"
    vocabulary = 256
    boundary: int | None = 0
    source = b""

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids [N] uint8 of every text."""
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]


class FileTokenizer(Tokenizer):
    """A tokenizer.json, as Hugging Face's `tokenizers` writes it."""

    def __init__(self, file: Path, boundary: str = "") -> None:
        """Raises DataError for a file that is no tokenizer, ConfigError for no such boundary."""
        try:
            from tokenizers import Tokenizer as Library
        except ImportError:
            raise DataError(
                f"tokenizer: {file} needs tokenizers; "
                "install it with: pip install 'manifold-hc[tokenizers]'"
            ) from None
        try:
            self.source = file.read_bytes()
        except OSError as error:
            raise DataError(f"tokenizer: {file} cannot be read: {error.strerror}") from None
        try:
            self._library = Library.from_str(self.source.decode())
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"tokenizer: {file} is no tokenizer.json: {error}") from None
        self._library.no_truncation()
        self._library.no_padding()
        ids = self._library.get_vocab(with_added_tokens=True)
        self.name = str(file)
        self.fingerprint = hashlib.sha256(self.source).hexdigest()
        self.vocabulary = max(ids.values()) + 1
        if boundary and boundary not in ids:
            raise ConfigError(f"data.boundary: {file} has no token {boundary!r}")
        names = (boundary,) if boundary else END_OF_TEXT
        self.boundary = next((ids[name] for name in names if name in ids), None)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids [N] uint32 of every text, on all cores."""
        found = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in found]


def tokenizer(name: str, boundary: str = "") -> Tokenizer:
    """The tokenizer `name`: "bytes" or "", or the path of a tokenizer.json."""
    if name not in ("", "bytes"):
        return FileTokenizer(Path(name).expanduser(), boundary)
    if boundary:
        raise ConfigError("data.boundary: bytes have the byte 0 as boundary; leave it out")
    return ByteTokenizer()


def narrowest(vocabulary: int) -> np.dtype:
    """The smallest unsigned dtype that holds every id."""
    return np.min_scalar_type(vocabulary - 1)
