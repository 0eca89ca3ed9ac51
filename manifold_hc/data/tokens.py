"""Tokens of many documents as one line, in memory or mapped from shards."""

import hashlib
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate

import numpy as np

from manifold_hc.errors import DataError


class Part(ABC):
    """A piece of the line: whole documents."""

    document_count: int
    """Number D of documents."""

    @property
    @abstractmethod
    def starts(self) -> np.ndarray:
        """First token of every document [D] int64, ascending from 0."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """Equal for equal ids and starts."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of tokens."""

    @abstractmethod
    def __getitem__(self, tokens: slice) -> np.ndarray:
        """Some of the ids."""


class ArrayPart(Part):
    """Ids in an array."""

    def __init__(
        self,
        ids: np.ndarray,
        starts: np.ndarray | None = None,
        hashed: "hashlib._Hash | None" = None,
    ) -> None:
        """ids: [N] unsigned; starts: [D], one document without; hashed: SHA-256 of the ids."""
        self.ids = ids
        self._hashed = hashed
        self._starts = np.zeros(1, dtype=np.int64) if starts is None else starts
        self.document_count = len(self._starts)

    @property
    def starts(self) -> np.ndarray:
        """As given."""
        return self._starts

    @property
    def digest(self) -> str:
        """SHA-256 of the ids, and of the starts where there are several."""
        if self._hashed is None:
            self._hashed = hashlib.sha256(np.ascontiguousarray(self.ids).data)
        found = self._hashed.copy()
        if len(self._starts) > 1:
            found.update(np.ascontiguousarray(self._starts).data)
        return found.hexdigest()

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.ids)

    def __getitem__(self, tokens: slice) -> np.ndarray:
        """A view."""
        return self.ids[tokens]


class Tokens:
    """The tokens [N] of one source, or of a stretch of it."""

    def __init__(self, parts: Sequence[Part], first: int = 0, stop: int | None = None) -> None:
        """From token `first` of all the parts up to token `stop`."""
        self.parts = parts
        self._ends = list(accumulate(map(len, parts)))
        self._documents = [0, *accumulate(part.document_count for part in parts)]
        self.first = first
        self.stop = self._ends[-1] if stop is None else stop

    def __len__(self) -> int:
        """Number of tokens N."""
        return self.stop - self.first

    def __getitem__(self, tokens: slice) -> "Tokens":
        """A stretch; nothing is read."""
        first, stop, _ = tokens.indices(len(self))
        return Tokens(self.parts, self.first + first, self.first + stop)

    def read(self, first: int, stop: int) -> np.ndarray:
        """Ids [stop - first] int64."""
        pieces = [part[tokens] for part, _, tokens in self._pieces(first, stop)]
        return np.concatenate(pieces).astype(np.int64)

    def documents(self, first: int, stop: int) -> np.ndarray:
        """A number [stop - first] int64 for the document of every token, ascending."""
        pieces = []
        for part, before, tokens in self._pieces(first, stop):
            positions = np.arange(tokens.start, tokens.stop)
            pieces.append(before + np.searchsorted(part.starts, positions, side="right"))
        return np.concatenate(pieces).astype(np.int64)

    def document_start(self, token: int) -> int:
        """The first start of a document at or after `token`, or the length where none is."""
        for part, _, tokens in self._pieces(token, len(self)):
            starts = part.starts
            found = np.searchsorted(starts, tokens.start)
            if found < len(starts) and starts[found] < tokens.stop:
                return token + int(starts[found]) - tokens.start
            token += tokens.stop - tokens.start
        return len(self)

    @property
    def digest(self) -> str:
        """Equal for the same stretch of equal parts."""
        digests = [part.digest for part in self.parts]
        if (self.first, self.stop) != (0, self._ends[-1]):
            digests.append(f"{self.first} to {self.stop}")
        return digests[0] if len(digests) == 1 else _joined(digests)

    def _pieces(self, first: int, stop: int) -> list[tuple[Part, int, slice]]:
        """(part, documents before it, its tokens) of a stretch."""
        first, stop = self.first + first, self.first + stop
        found = []
        index = bisect_right(self._ends, first)
        while first < stop:
            begin = self._ends[index] - len(self.parts[index])
            end = min(stop, self._ends[index])
            tokens = slice(first - begin, end - begin)
            found.append((self.parts[index], self._documents[index], tokens))
            first, index = end, index + 1
        return found


class Corpus:
    """What a run trains on: one or more sources in the ids of one tokenizer."""

    def __init__(
        self,
        sources: Sequence[Tokens],
        vocabulary: int,
        weights: tuple[float, ...] = (),
        tokenizer: str = "bytes",
    ) -> None:
        """vocabulary: largest id + 1; weights: shares of the sources, or none; tokenizer: name."""
        self.sources = tuple(sources)
        self.vocabulary = vocabulary
        self.weights = weights
        self.tokenizer = tokenizer

    @classmethod
    def of(cls, ids: np.ndarray) -> "Corpus":
        """One document, its ids [N] in memory."""
        return cls([Tokens([ArrayPart(ids)])], int(ids.max()) + 1)

    def __len__(self) -> int:
        """Number of tokens of all sources."""
        return sum(map(len, self.sources))

    @cached_property
    def digest(self) -> str:
        """Which data a run was trained on: equal for equal tokens in equal sources."""
        digests = [source.digest for source in self.sources]
        return digests[0] if len(digests) == 1 else _joined(digests)

    def split(self, sequence: int, fraction: float) -> tuple["Corpus", "Corpus"]:
        """Training and validation: the end of every source is held out.

        The cut is the first start of a document in the last `fraction`, if that leaves at least
        half of it, and in the midst of a document otherwise. Either side has at least one sequence
        and its next token; DataError where a source is too short for that.
        """
        cuts = [_cut(source, sequence, fraction) for source in self.sources]
        return (
            self._with([s[:cut] for s, cut in zip(self.sources, cuts, strict=True)]),
            self._with([s[cut:] for s, cut in zip(self.sources, cuts, strict=True)]),
        )

    def _with(self, sources: Sequence[Tokens]) -> "Corpus":
        return Corpus(sources, self.vocabulary, self.weights, self.tokenizer)


def _cut(source: Tokens, sequence: int, fraction: float) -> int:
    least = sequence + 1
    held_out = max(round(len(source) * fraction), least)
    cut = len(source) - held_out
    if len(source) < 2 * least:
        raise DataError(
            f"data: the text must have at least {2 * least} tokens, one sequence of "
            f"{sequence} and its next token for training and one for validation, but has "
            f"{len(source)}; give more text or a smaller data.sequence"
        )
    if cut < least:
        raise DataError(
            f"data: data.validation={fraction:g} leaves {cut} of {len(source)} tokens for "
            f"training, which needs at least {least}, one sequence of {sequence} and its next "
            f"token; give data.validation={0.99 * (1 - least / len(source)):.2g} or less"
        )
    start = source.document_start(cut)
    return start if len(source) - start > max(held_out // 2, sequence) else cut


def _joined(digests: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()
