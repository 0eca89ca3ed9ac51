"""Tokenization of documents, piece by piece, so that memory is bounded."""

import hashlib
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO

import numpy as np

from manifold_hc.data.documents import Document
from manifold_hc.data.tokenizer import Tokenizer, narrowest_dtype
from manifold_hc.data.tokens import ArraySegment
from manifold_hc.errors import DataError

BATCH_CHARACTERS = 1_000_000
"""Characters that are tokenized at a time: the library needs about 150 MB for them."""

MEMORY_BYTES = 64_000_000
"""Bytes of ids that are kept in memory; more are moved to a temporary file."""


def encode(
    documents: Iterable[Document], tokenizer: Tokenizer
) -> Iterator[tuple[bool, np.ndarray]]:
    """Tokenize documents in order; yield (True if a document begins, its next ids [N]).

    The ids have the narrowest dtype. The boundary token is put before each document but the first.
    A document without ids is left out, and its boundary token too.
    """
    dtype = narrowest_dtype(tokenizer.vocabulary)
    boundary = np.array([t for t in [tokenizer.boundary] if t is not None], dtype=dtype)
    has_ids, begins = False, False
    for batch in _batches(documents, tokenizer):
        encoded = tokenizer.encode([piece for _, piece in batch])
        for (first, _), ids in zip(batch, encoded, strict=True):
            begins = begins or first
            if not len(ids):
                continue
            ids = ids.astype(dtype, copy=False)
            yield begins, np.concatenate([boundary, ids]) if begins and has_ids else ids
            has_ids, begins = True, False


def concatenate(encoded: Iterable[tuple[bool, np.ndarray]]) -> ArraySegment:
    """Concatenate encoded documents.

    More than `MEMORY_BYTES` of ids are mapped from an unnamed temporary file, which is removed with
    the array. Raises DataError if they do not fit on that disk.
    """
    buffer, starts = _IdBuffer(), array("q")
    for begins, ids in encoded:
        if begins:
            starts.append(buffer.size)
        buffer.append(ids)
    return ArraySegment(buffer.ids(), np.array(starts, dtype=np.int64), buffer.hashed)


class _IdBuffer:
    """A growing array of ids, in memory or in a temporary file."""

    def __init__(self) -> None:
        self.size = 0
        self.hashed = hashlib.sha256()  # updated on append, so that no mapped page is read for it
        self._dtype = np.dtype(np.uint8)
        self._memory = bytearray()
        self._file: IO[bytes] | None = None

    def append(self, ids: np.ndarray) -> None:
        self._memory += ids.data
        self.hashed.update(ids.data)
        self.size, self._dtype = self.size + len(ids), ids.dtype
        if len(self._memory) > MEMORY_BYTES:
            with _disk_errors():
                self._file = self._file or tempfile.TemporaryFile()  # noqa: SIM115
                self._file.write(self._memory)
            self._memory.clear()

    def ids(self) -> np.ndarray:
        if self._file is None:
            return np.frombuffer(self._memory, dtype=self._dtype)
        with _disk_errors(), self._file as file:
            file.write(self._memory)
            file.flush()
            return np.memmap(file, self._dtype, mode="r", shape=(self.size,))


@contextmanager
def _disk_errors() -> Iterator[None]:
    """Raise an OSError of the temporary file as DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"data: the ids of the text do not fit in {tempfile.gettempdir()}: {error.strerror}; "
            "set TMPDIR to a folder with more room, or give the shards of mhc tokenize"
        ) from None


def _batches(
    documents: Iterable[Document], tokenizer: Tokenizer
) -> Iterator[list[tuple[bool, str]]]:
    """Yield batches of (True for the first piece of a document, piece) to tokenize at once."""
    batch: list[tuple[bool, str]] = []
    size = 0
    for document in documents:
        for number, piece in enumerate(tokenizer.split(document)):
            batch.append((number == 0, piece))
            size += len(piece)
            if size >= BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch
