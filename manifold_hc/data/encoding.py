"""Documents to ids, part by part: no more text is held than is encoded at a time."""

import hashlib
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO

import numpy as np

from manifold_hc.data.documents import Document
from manifold_hc.data.tokenizer import Tokenizer, narrowest
from manifold_hc.data.tokens import ArrayPart
from manifold_hc.errors import DataError

BATCH_CHARACTERS = 1_000_000
"""Characters that are encoded at a time: about 150 MB in the library."""

HELD = 64_000_000
"""Bytes of ids that are held in memory; more wait in a file."""


def encode(
    documents: Iterable[Document], tokenizer: Tokenizer
) -> Iterator[tuple[bool, np.ndarray]]:
    """(whether a document begins, its next ids [N] in the narrowest dtype), in order.

    The boundary stands before each document but the first; one without ids has none.
    """
    dtype = narrowest(tokenizer.vocabulary)
    boundary = np.array([t for t in [tokenizer.boundary] if t is not None], dtype=dtype)
    some, begins = False, False
    for batch in _batches(documents, tokenizer):
        found = tokenizer.encode([part for _, part in batch])
        for (first, _), ids in zip(batch, found, strict=True):
            begins = begins or first
            if not len(ids):
                continue
            ids = ids.astype(dtype, copy=False)
            yield begins, np.concatenate([boundary, ids]) if begins and some else ids
            some, begins = True, False


def joined(encoded: Iterable[tuple[bool, np.ndarray]]) -> ArrayPart:
    """Encoded documents in one line.

    Many ids are mapped from a file without a name among the temporary files, which goes away with
    the array. Raises DataError when they do not fit there.
    """
    line, starts = _Line(), array("q")
    for begins, ids in encoded:
        if begins:
            starts.append(line.size)
        line.append(ids)
    return ArrayPart(line.ids(), np.array(starts, dtype=np.int64), line.hashed)


class _Line:
    """Ids that still come."""

    def __init__(self) -> None:
        self.size = 0
        self.hashed = hashlib.sha256()  # as they come: no mapped page is read for it
        self._dtype = np.dtype(np.uint8)
        self._held = bytearray()
        self._file: IO[bytes] | None = None

    def append(self, ids: np.ndarray) -> None:
        self._held += ids.data
        self.hashed.update(ids.data)
        self.size, self._dtype = self.size + len(ids), ids.dtype
        if len(self._held) > HELD:
            with _room():
                self._file = self._file or tempfile.TemporaryFile()  # noqa: SIM115
                self._file.write(self._held)
            self._held.clear()

    def ids(self) -> np.ndarray:
        if self._file is None:
            return np.frombuffer(self._held, dtype=self._dtype)
        with _room(), self._file as file:
            file.write(self._held)
            file.flush()
            return np.memmap(file, self._dtype, mode="r", shape=(self.size,))


@contextmanager
def _room() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"data: the ids of the text do not fit in {tempfile.gettempdir()}: {error.strerror}; "
            "set TMPDIR to a folder with more room, or give what mhc tokenize makes of the text"
        ) from None


def _batches(
    documents: Iterable[Document], tokenizer: Tokenizer
) -> Iterator[list[tuple[bool, str]]]:
    """Parts, each with whether it is the first of its document, as many as are encoded at once."""
    held: list[tuple[bool, str]] = []
    size = 0
    for document in documents:
        for number, part in enumerate(tokenizer.parts(document)):
            held.append((number == 0, part))
            size += len(part)
            if size >= BATCH_CHARACTERS:
                yield held
                held, size = [], 0
    if held:
        yield held
