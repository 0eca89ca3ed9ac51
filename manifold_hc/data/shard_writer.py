"""Shards, written as their ids come: a shard's ids wait in a file, not in memory."""

import hashlib
import os
import shutil
import tempfile
from array import array
from collections.abc import Iterable
from contextlib import ExitStack, closing
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import IO

import msgspec
import numpy as np

from manifold_hc.data.documents import Document, Skipped
from manifold_hc.data.encoding import encode
from manifold_hc.data.shards import INDEX, TOKENIZER, ShardEntry, ShardIndex
from manifold_hc.data.tokenizer import Tokenizer, narrowest
from manifold_hc.errors import DataError
from manifold_hc.files import write_atomically

SHARD_TOKENS = 2**28
"""Tokens in a shard: half a gigabyte of ids below 65536."""

BLOCK = 2**20
"""Bytes that are copied at a time."""


def write(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    folder: Path,
    limit: int = SHARD_TOKENS,
    skipped: Skipped | None = None,
) -> ShardIndex:
    """Tokenize into `folder`, which must exist; its index is written last and marks it whole.

    A shard has as many whole documents as fit in `limit` tokens; a longer one is alone.
    skipped: what counts the broken rows of `documents`. Raises DataError for texts without tokens.
    """
    with ExitStack() as held:
        entries = _write_shards(documents, tokenizer, folder, limit, held)
    if tokenizer.source:
        write_atomically(folder / TOKENIZER, tokenizer.source)
    index = ShardIndex(
        tokenizer.fingerprint,
        tokenizer.vocabulary,
        tokenizer.boundary,
        tuple(entries),
        text_as_text=True,
        skipped=dict(skipped.reasons) if skipped else {},
    )
    content = msgspec.json.format(msgspec.json.encode(asdict(index)))
    write_atomically(folder / INDEX, content)
    return index


def _write_shards(
    documents: Iterable[Document], tokenizer: Tokenizer, folder: Path, limit: int, held: ExitStack
) -> list[ShardEntry]:
    """The shards, written; their temporary files are closed with `held`."""
    dtype = narrowest(tokenizer.vocabulary)
    entries: list[ShardEntry] = []

    def fresh(number: int) -> _OpenShard:
        return held.enter_context(closing(_OpenShard(folder, number, dtype)))

    shard = fresh(0)
    for begins, ids in encode(documents, tokenizer):
        if shard.tokens + len(ids) > limit and shard.holds_another(begins):
            full, shard = shard, fresh(len(entries) + 1)
            if not begins:
                full.move_last(shard)
            entries.append(full.save(tokenizer.fingerprint))
        shard.append(begins, ids)
    if not shard.tokens:
        raise DataError(f"tokenize: the text gives no tokens with {tokenizer.name}; give another")
    return [*entries, shard.save(tokenizer.fingerprint)]


class _OpenShard:
    """A shard whose ids still come."""

    def __init__(self, folder: Path, number: int, dtype: np.dtype) -> None:
        self.tokens = 0
        self.starts = array("q")
        self._file = folder / f"shard-{number:05}.safetensors"
        self._ids: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._dtype = dtype

    def holds_another(self, begins: bool) -> bool:
        """Whether there is a document before the one whose ids come, which may have begun."""
        return len(self.starts) > (0 if begins else 1)

    def append(self, begins: bool, ids: np.ndarray) -> None:
        """Add ids of the last document, or of a new one."""
        if begins:
            self.starts.append(self.tokens)
        self._ids.write(ids.data)
        self.tokens += len(ids)

    def move_last(self, other: "_OpenShard") -> None:
        """Move the last document into the shard `other`, which is empty."""
        start = self.starts.pop()
        self._ids.seek(start * self._dtype.itemsize)
        shutil.copyfileobj(self._ids, other._ids, BLOCK)
        self._ids.truncate(start * self._dtype.itemsize)
        other.starts.append(0)
        other.tokens, self.tokens = self.tokens - start, start

    def save(self, tokenizer: str) -> ShardEntry:
        """Write the shard: to the bit what `safetensors.numpy.save` makes of ids and starts."""
        starts = np.array(self.starts, dtype="<i8").tobytes()
        end = len(starts) + self.tokens * self._dtype.itemsize
        tensors = {
            "__metadata__": {"tokenizer": tokenizer},
            "starts": _tensor("I64", len(self.starts), 0, len(starts)),
            "ids": _tensor(f"U{8 * self._dtype.itemsize}", self.tokens, len(starts), end),
        }
        header = msgspec.json.encode(tensors)
        header += b" " * (-len(header) % 8)
        found = hashlib.sha256()
        self._ids.seek(0)
        with closing(self), self._file.open("wb") as file:
            pieces = (len(header).to_bytes(8, "little"), header, starts)
            for piece in chain(pieces, iter(lambda: self._ids.read(BLOCK), b"")):
                file.write(piece)
                found.update(piece)
            file.flush()
            os.fsync(file.fileno())
        return ShardEntry(self._file.name, self.tokens, len(self.starts), found.hexdigest())

    def close(self) -> None:
        """Let go of the temporary file."""
        self._ids.close()


def _tensor(dtype: str, length: int, start: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": [length], "data_offsets": [start, end]}
