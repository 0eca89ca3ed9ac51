"""Writer of shards: the ids of the current shard are kept in a temporary file."""

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
from manifold_hc.data.tokenizer import Tokenizer, narrowest_dtype
from manifold_hc.errors import DataError
from manifold_hc.files import write_atomically

SHARD_TOKENS = 2**28
"""Tokens in a shard: half a gigabyte of ids below 65536."""

COPY_BYTES = 2**20
"""Bytes that are copied at a time."""


def write(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    folder: Path,
    limit: int = SHARD_TOKENS,
    skipped: Skipped | None = None,
) -> ShardIndex:
    """Tokenize documents into shards; the index is written last and marks the folder complete.

    A shard has as many whole documents as fit in `limit` tokens; a longer document has its own.

    Args:
        documents: texts.
        tokenizer: its ids and its tokenizer.json are written.
        folder: an existing folder.
        limit: tokens of a shard.
        skipped: count of the broken rows of `documents`, for the index.

    Raises:
        DataError: for texts without tokens.
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
    """Write the shards; `held` closes their temporary files."""
    dtype = narrowest_dtype(tokenizer.vocabulary)
    entries: list[ShardEntry] = []

    def new_shard(number: int) -> _OpenShard:
        return held.enter_context(closing(_OpenShard(folder, number, dtype)))

    shard = new_shard(0)
    for begins, ids in encode(documents, tokenizer):
        if shard.tokens + len(ids) > limit and shard.holds_another(begins):
            full, shard = shard, new_shard(len(entries) + 1)
            if not begins:
                full.move_last(shard)
            entries.append(full.save(tokenizer.fingerprint))
        shard.append(begins, ids)
    if not shard.tokens:
        raise DataError(f"tokenize: the text gives no tokens with {tokenizer.name}; give another")
    return [*entries, shard.save(tokenizer.fingerprint)]


class _OpenShard:
    """A shard that is being written."""

    def __init__(self, folder: Path, number: int, dtype: np.dtype) -> None:
        self.tokens = 0
        self.starts = array("q")
        self._file = folder / f"shard-{number:05}.safetensors"
        self._ids: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._dtype = dtype

    def holds_another(self, begins: bool) -> bool:
        """Return True if the shard has a document other than the one of the next ids.

        begins: True if the next ids begin a document; otherwise they continue the last one.
        """
        return len(self.starts) > (0 if begins else 1)

    def append(self, begins: bool, ids: np.ndarray) -> None:
        """Append ids of the last document, or of a new one if `begins`."""
        if begins:
            self.starts.append(self.tokens)
        self._ids.write(ids.data)
        self.tokens += len(ids)

    def move_last(self, other: "_OpenShard") -> None:
        """Move the last document to the empty shard `other`."""
        start = self.starts.pop()
        self._ids.seek(start * self._dtype.itemsize)
        shutil.copyfileobj(self._ids, other._ids, COPY_BYTES)
        self._ids.truncate(start * self._dtype.itemsize)
        other.starts.append(0)
        other.tokens, self.tokens = self.tokens - start, start

    def save(self, tokenizer: str) -> ShardEntry:
        """Write the shard, the same bytes as `safetensors.numpy.save` of ids and starts."""
        starts = np.array(self.starts, dtype="<i8").tobytes()
        end = len(starts) + self.tokens * self._dtype.itemsize
        tensors = {
            "__metadata__": {"tokenizer": tokenizer},
            "starts": _tensor("I64", len(self.starts), 0, len(starts)),
            "ids": _tensor(f"U{8 * self._dtype.itemsize}", self.tokens, len(starts), end),
        }
        header = msgspec.json.encode(tensors)
        header += b" " * (-len(header) % 8)
        hashed = hashlib.sha256()
        self._ids.seek(0)
        with closing(self), self._file.open("wb") as file:
            start = (len(header).to_bytes(8, "little"), header, starts)
            for data in chain(start, iter(lambda: self._ids.read(COPY_BYTES), b"")):
                file.write(data)
                hashed.update(data)
            file.flush()
            os.fsync(file.fileno())
        return ShardEntry(self._file.name, self.tokens, len(self.starts), hashed.hexdigest())

    def close(self) -> None:
        """Close the temporary file."""
        self._ids.close()


def _tensor(dtype: str, length: int, start: int, end: int) -> dict[str, object]:
    """Return the header entry of a one-dimensional tensor at bytes start..end."""
    return {"dtype": dtype, "shape": [length], "data_offsets": [start, end]}
