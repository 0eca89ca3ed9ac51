"""Tokenized shards: safetensors files of ids and document starts, mapped and never read whole.

A folder of shards holds `shard-00000.safetensors`, ..., the tokenizer.json they were made with, and
`shards.json`, written last: what the folder must hold.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import msgspec
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from manifold_hc.data.tokenizer import Tokenizer, narrowest
from manifold_hc.data.tokens import Part
from manifold_hc.errors import DataError
from manifold_hc.files import write_atomically

INDEX = "shards.json"
TOKENIZER = "tokenizer.json"

SHARD_TOKENS = 2**28
"""Tokens in a shard: half a gigabyte of ids below 65536."""

BATCH_CHARACTERS = 4_000_000
"""Characters that are tokenized at a time."""

OPEN_STARTS = 16
"""Shards whose document starts are held in memory at a time."""


@dataclass(frozen=True)
class ShardEntry:
    """One shard, as the index knows it."""

    file: str
    tokens: int
    documents: int
    sha256: str


@dataclass(frozen=True)
class ShardIndex:
    """What a folder of shards holds, and what made its ids."""

    tokenizer: str
    """Fingerprint: bytes, or the SHA-256 of tokenizer.json."""
    vocabulary: int
    boundary: int | None
    shards: tuple[ShardEntry, ...]

    @property
    def tokens(self) -> int:
        """Tokens of all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        """Documents of all shards."""
        return sum(shard.documents for shard in self.shards)


class Shard(Part):
    """One shard, mapped: a `Part` of tokens."""

    def __init__(self, file: Path, entry: ShardEntry, tokenizer: str) -> None:
        """Raises DataError unless the file is the one of the index, made by `tokenizer`."""
        try:
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
        """SHA-256 of the file, as the index says."""
        return self._entry.sha256

    @property
    def starts(self) -> np.ndarray:
        """First token of every document [D] int64."""
        return _starts(self)

    def __len__(self) -> int:
        """Number of tokens."""
        return self._entry.tokens

    def __getitem__(self, tokens: slice) -> np.ndarray:
        """Some of the ids, read from the map."""
        return self._ids[tokens]

    def read_starts(self) -> np.ndarray:
        """The starts, read from the map."""
        starts: np.ndarray = self._content.get_tensor("starts")
        return starts


@lru_cache(maxsize=OPEN_STARTS)
def _starts(shard: Shard) -> np.ndarray:
    return shard.read_starts()


class ShardFolder:
    """A folder of shards, opened."""

    def __init__(self, path: Path) -> None:
        """Raises DataError for a folder that is not whole."""
        self.path = path
        try:
            content = (path / INDEX).read_bytes()
            self.index = msgspec.json.decode(content, type=ShardIndex)
        except OSError as error:
            raise DataError(f"data: {path / INDEX} cannot be read: {error.strerror}") from None
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise DataError(f"data: {path / INDEX} is damaged: {error}") from None

    @cached_property
    def shards(self) -> list[Shard]:
        """All shards; DataError for one that is missing, damaged or of another tokenizer."""
        made_by = self.index.tokenizer
        return [Shard(self.path / entry.file, entry, made_by) for entry in self.index.shards]

    def verify(self) -> None:
        """Raise DataError for a shard whose content is not what was tokenized."""
        for shard, entry in zip(self.shards, self.index.shards, strict=True):
            with shard.file.open("rb") as content:
                if hashlib.file_digest(content, "sha256").hexdigest() != entry.sha256:
                    raise DataError(f"data: {shard.file} is altered; tokenize its text again")

    @property
    def tokenizer_file(self) -> Path | None:
        """The tokenizer.json that the ids were made with; None for bytes."""
        return None if self.index.tokenizer == "bytes" else self.path / TOKENIZER


def is_shards(path: Path) -> bool:
    """Whether `path` is a folder of shards."""
    return (path / INDEX).is_file()


def short(fingerprint: str | None) -> str:
    """A fingerprint for messages."""
    return "unknown" if fingerprint is None else fingerprint[:12]


def encode(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Ids of every document that has any, the boundary before each but the first."""
    dtype = narrowest(tokenizer.vocabulary)
    before = np.empty(0, dtype=dtype)
    for batch in _batches(texts):
        for ids in tokenizer.encode(batch):
            if len(ids):
                yield np.concatenate([before, ids.astype(dtype)])
                before = np.array([t for t in [tokenizer.boundary] if t is not None], dtype=dtype)


def pack(documents: Iterable[np.ndarray], limit: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids, starts) of as many whole documents as fit in `limit` tokens; a longer one is alone."""
    held: list[np.ndarray] = []
    size = 0
    for ids in documents:
        if held and size + len(ids) > limit:
            yield joined(held)
            held, size = [], 0
        held.append(ids)
        size += len(ids)
    if held:
        yield joined(held)


def joined(documents: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Documents in one line: ids [N], starts [D] int64."""
    starts = np.cumsum([0, *map(len, documents)], dtype=np.int64)[:-1]
    return np.concatenate(documents or [np.empty(0, dtype=np.uint8)]), starts


def write(
    texts: Iterable[str], tokenizer: Tokenizer, folder: Path, limit: int = SHARD_TOKENS
) -> ShardIndex:
    """Tokenize into `folder`, which must exist; its index is written last and marks it whole."""
    entries = []
    for number, (ids, starts) in enumerate(pack(encode(texts, tokenizer), limit)):
        content = save({"ids": ids, "starts": starts}, {"tokenizer": tokenizer.fingerprint})
        file = f"shard-{number:05}.safetensors"
        write_atomically(folder / file, content)
        digest = hashlib.sha256(content).hexdigest()
        entries.append(ShardEntry(file, len(ids), len(starts), digest))
    if tokenizer.source:
        write_atomically(folder / TOKENIZER, tokenizer.source)
    index = ShardIndex(
        tokenizer.fingerprint, tokenizer.vocabulary, tokenizer.boundary, tuple(entries)
    )
    content = msgspec.json.format(msgspec.json.encode(asdict(index)))
    write_atomically(folder / INDEX, content)
    return index


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    held: list[str] = []
    size = 0
    for text in texts:
        held.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield held
            held, size = [], 0
    if held:
        yield held
