"""Token ids of one source: segments of whole documents, in memory or mapped from shards."""

import hashlib
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np


class Segment(ABC):
    """Consecutive token ids of whole documents."""

    document_count: int
    """Number of documents D."""

    @property
    @abstractmethod
    def starts(self) -> np.ndarray:
        """Index of the first token of every document, [D] int64, ascending from 0."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """Digest of ids and starts."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of tokens."""

    @abstractmethod
    def __getitem__(self, tokens: slice) -> np.ndarray:
        """Return the ids in a slice."""


class ArraySegment(Segment):
    """A segment in an array."""

    def __init__(
        self,
        ids: np.ndarray,
        starts: np.ndarray | None = None,
        hashed: "hashlib._Hash | None" = None,
    ) -> None:
        """ids: [N] unsigned; starts: [D], default one document; hashed: SHA-256 of the ids."""
        self.ids = ids
        self._hashed = hashed
        self._starts = np.zeros(1, dtype=np.int64) if starts is None else starts
        self.document_count = len(self._starts)

    @property
    def starts(self) -> np.ndarray:
        """Index of the first token of every document, [D] int64."""
        return self._starts

    @property
    def digest(self) -> str:
        """SHA-256 of the ids, and of the starts if there are several."""
        if self._hashed is None:
            self._hashed = hashlib.sha256(np.ascontiguousarray(self.ids).data)
        found = self._hashed.copy()
        if len(self._starts) > 1:
            found.update(np.ascontiguousarray(self._starts).data)
        return found.hexdigest()

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.ids)

    def __getitem__(self, tokens: slice) -> np.ndarray:
        """Return a view of the ids in a slice."""
        return self.ids[tokens]


class Tokens:
    """Token ids [N] of one source, or of a range of it; segments follow one another."""

    def __init__(
        self, segments: Sequence[Segment], first: int = 0, stop: int | None = None
    ) -> None:
        """first, stop: range of tokens, counted over all segments; stop defaults to the end."""
        self.segments = segments
        self._ends = list(accumulate(map(len, segments)))
        self._documents = [0, *accumulate(segment.document_count for segment in segments)]
        self.first = first
        self.stop = self._ends[-1] if stop is None else stop

    def __len__(self) -> int:
        """Return the number of tokens N."""
        return self.stop - self.first

    def __getitem__(self, tokens: slice) -> "Tokens":
        """Return a range of the tokens, without reading them."""
        first, stop, _ = tokens.indices(len(self))
        return Tokens(self.segments, self.first + first, self.first + stop)

    def read(self, first: int, stop: int) -> np.ndarray:
        """Return the ids [stop - first] int64."""
        found = [segment[tokens] for segment, _, tokens in self._locate(first, stop)]
        return np.concatenate(found).astype(np.int64)

    def documents(self, first: int, stop: int) -> np.ndarray:
        """Return the document number of every token, [stop - first] int64, ascending."""
        found = []
        for segment, before, tokens in self._locate(first, stop):
            positions = np.arange(tokens.start, tokens.stop)
            found.append(before + np.searchsorted(segment.starts, positions, side="right"))
        return np.concatenate(found).astype(np.int64)

    def document_start(self, token: int) -> int:
        """Return the first start of a document at or after `token`, N if there is none."""
        for segment, _, tokens in self._locate(token, len(self)):
            starts = segment.starts
            found = np.searchsorted(starts, tokens.start)
            if found < len(starts) and starts[found] < tokens.stop:
                return token + int(starts[found]) - tokens.start
            token += tokens.stop - tokens.start
        return len(self)

    @property
    def digest(self) -> str:
        """Digest of the segments and of the range; equal for equal tokens in equal segments."""
        digests = [segment.digest for segment in self.segments]
        if (self.first, self.stop) != (0, self._ends[-1]):
            digests.append(f"{self.first} to {self.stop}")
        return combined_digest(digests)

    def _locate(self, first: int, stop: int) -> list[tuple[Segment, int, slice]]:
        """Return (segment, documents before it, its tokens) for each segment of a range."""
        first, stop = self.first + first, self.first + stop
        found = []
        index = bisect_right(self._ends, first)
        while first < stop:
            begin = self._ends[index] - len(self.segments[index])
            end = min(stop, self._ends[index])
            tokens = slice(first - begin, end - begin)
            found.append((self.segments[index], self._documents[index], tokens))
            first, index = end, index + 1
        return found


def combined_digest(digests: Sequence[str]) -> str:
    """Return one digest of several; a single one is returned as it is."""
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()
