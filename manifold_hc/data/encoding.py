"""Documents to ids, part by part: no more text is held than is encoded at a time."""

from array import array
from collections.abc import Iterable, Iterator

import numpy as np

from manifold_hc.data.documents import Document
from manifold_hc.data.tokenizer import Tokenizer, narrowest

BATCH_CHARACTERS = 1_000_000
"""Characters that are encoded at a time: about 150 MB in the library."""


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


def joined(encoded: Iterable[tuple[bool, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Encoded documents in one line: ids [N], starts [D] int64."""
    content, starts, size, dtype = bytearray(), array("q"), 0, np.dtype(np.uint8)
    for begins, ids in encoded:
        if begins:
            starts.append(size)
        content += ids.data
        size, dtype = size + len(ids), ids.dtype
    return np.frombuffer(content, dtype=dtype), np.array(starts, dtype=np.int64)


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
