"""Tokenized shards: memory-mapped safetensors files of ids and document starts.

A folder of shards contains `shard-00000.safetensors`, ..., the tokenizer.json of their tokenizer,
and their index `shards.json`, which is written last.
"""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

import msgspec
import numpy as np
from safetensors import SafetensorError, safe_open

from manifold_hc.data.tokens import Segment
from manifold_hc.errors import DataError
from manifold_hc.files import open_regular

INDEX = "shards.json"
TOKENIZER = "tokenizer.json"

OPEN_STARTS = 16
"""Number of shards whose document starts are kept in memory."""


@dataclass(frozen=True)
class ShardEntry:
    """Entry of one shard in the index."""

    file: str
    tokens: int
    documents: int
    sha256: str


@dataclass(frozen=True)
class ShardIndex:
    """Index of a folder of shards: `shards.json`."""

    tokenizer: str
    """Fingerprint: bytes, or the SHA-256 of tokenizer.json."""
    vocabulary: int
    boundary: int | None
    shards: tuple[ShardEntry, ...]
    text_as_text: bool = False
    """True if text that contains the name of a special token has the ids of its characters.

    Shards without this field have the special token instead.
    """
    skipped: dict[str, int] = field(default_factory=dict)
    """Number of broken rows that were left out, by reason."""

    @property
    def tokens(self) -> int:
        """Number of tokens of all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        """Number of documents of all shards."""
        return sum(shard.documents for shard in self.shards)


class Shard(Segment):
    """A memory-mapped shard."""

    def __init__(self, file: Path, entry: ShardEntry, tokenizer: str) -> None:
        """Open a shard; DataError if it does not match its index entry or `tokenizer`."""
        try:
            open_regular(file).close()
            self._content = safe_open(file, framework="numpy")
            made_by = (self._content.metadata() or {}).get("tokenizer")
            self._ids = self._content.get_slice("ids")
            found = (self._ids.get_shape(), self._content.get_slice("starts").get_shape())
        except (OSError, SafetensorError) as error:
            raise DataError(f"data: {file} is missing or damaged: {error}") from None
        if made_by != tokenizer:
            raise DataError(
                f"data: {file} was made with another tokenizer ({short(made_by)}) than the folder "
                f"({short(tokenizer)}); tokenize its text again"
            )
        if found != ([entry.tokens], [entry.documents]):
            raise DataError(f"data: {file} is not the shard that {INDEX} names; tokenize again")
        self.file = file
        self.document_count = entry.documents
        self._entry = entry

    @property
    def digest(self) -> str:
        """SHA-256 of the file, from the index."""
        return self._entry.sha256

    @property
    def starts(self) -> np.ndarray:
        """Index of the first token of every document, [D] int64."""
        return _starts(self)

    def __len__(self) -> int:
        """Return the number of tokens."""
        return self._entry.tokens

    def __getitem__(self, tokens: slice) -> np.ndarray:
        """Read the ids in a slice."""
        return self._ids[tokens]

    def read_starts(self) -> np.ndarray:
        """Read the document starts."""
        starts: np.ndarray = self._content.get_tensor("starts")
        return starts


@lru_cache(maxsize=OPEN_STARTS)
def _starts(shard: Shard) -> np.ndarray:
    return shard.read_starts()


class ShardFolder:
    """A folder of shards and its index."""

    def __init__(self, path: Path) -> None:
        """Read the index; DataError if it is missing or damaged."""
        self.path = path
        try:
            content = (path / INDEX).read_bytes()
            self.index = msgspec.json.decode(content, type=ShardIndex)
        except OSError as error:
            raise DataError(f"data: {path / INDEX} cannot be read: {error.strerror}") from None
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise DataError(f"data: {path / INDEX} is damaged: {error}") from None
        if not self.index.shards:
            raise DataError(f"data: {path / INDEX} is damaged: it names no shard")
        for entry in self.index.shards:
            if Path(entry.file).name != entry.file:
                raise DataError(f"data: {path / INDEX} names {entry.file}, outside its folder")

    @cached_property
    def shards(self) -> list[Shard]:
        """All shards; DataError for one that is missing, damaged or of another tokenizer."""
        made_by = self.index.tokenizer
        return [Shard(self.path / entry.file, entry, made_by) for entry in self.index.shards]

    def verify(self) -> None:
        """Raise DataError for a shard that does not match its checksum."""
        for shard, entry in zip(self.shards, self.index.shards, strict=True):
            with shard.file.open("rb") as content:
                if hashlib.file_digest(content, "sha256").hexdigest() != entry.sha256:
                    raise DataError(f"data: {shard.file} is altered; tokenize its text again")

    @property
    def tokenizer_file(self) -> Path | None:
        """The tokenizer.json of the shards; None for bytes."""
        return None if self.index.tokenizer == "bytes" else self.path / TOKENIZER


def is_shard_folder(path: Path) -> bool:
    """Return True if `path` is a folder of shards."""
    return (path / INDEX).is_file()


def short(fingerprint: str | None) -> str:
    """Shorten a fingerprint for messages."""
    return "unknown" if fingerprint is None else fingerprint[:12]
