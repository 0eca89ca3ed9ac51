"""The sources of a run, in the ids of one tokenizer, and their split for validation."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from manifold_hc.data.tokens import ArraySegment, Tokens, combined_digest
from manifold_hc.errors import DataError


class Corpus:
    """Tokens of one or more sources of a run."""

    def __init__(
        self,
        sources: Sequence[Tokens],
        vocabulary: int,
        weights: tuple[float, ...] = (),
        tokenizer: str = "bytes",
    ) -> None:
        """Combine sources.

        Args:
            sources: tokens of every source.
            vocabulary: largest id + 1.
            weights: share of every source in the sequences; none: all tokens once an epoch.
            tokenizer: name for messages.
        """
        self.sources = tuple(sources)
        self.vocabulary = vocabulary
        self.weights = weights
        self.tokenizer = tokenizer

    @classmethod
    def of(cls, ids: np.ndarray) -> "Corpus":
        """Return a corpus of one document with the ids [N], unsigned integers."""
        return cls([Tokens([ArraySegment(ids)])], int(ids.max()) + 1)

    def __len__(self) -> int:
        """Return the number of tokens of all sources."""
        return sum(map(len, self.sources))

    @cached_property
    def digest(self) -> str:
        """Digest that identifies the data of a run; equal for equal tokens in equal sources."""
        return combined_digest([source.digest for source in self.sources])

    def split(self, sequence: int, fraction: float) -> tuple["Corpus", "Corpus"]:
        """Split into training and validation; validation is the end of every source.

        A source is split at the first start of a document in its last `fraction` if that holds out
        at least half of the fraction, and within a document otherwise.

        Args:
            sequence: tokens of a sequence. Either side of a source has at least one sequence and
                its next token.
            fraction: share of the tokens of every source to hold out.

        Raises:
            DataError: for a source that is too short.
        """
        splits = [_split_point(source, sequence, fraction) for source in self.sources]
        return (
            self._with([s[:split] for s, split in zip(self.sources, splits, strict=True)]),
            self._with([s[split:] for s, split in zip(self.sources, splits, strict=True)]),
        )

    def _with(self, sources: Sequence[Tokens]) -> "Corpus":
        return Corpus(sources, self.vocabulary, self.weights, self.tokenizer)


def _split_point(source: Tokens, sequence: int, fraction: float) -> int:
    """Return the index of the first token that is held out."""
    least = sequence + 1
    held_out = max(round(len(source) * fraction), least)
    split = len(source) - held_out
    if len(source) < 2 * least:
        raise DataError(
            f"data: the text must have at least {2 * least} tokens, one sequence of "
            f"{sequence} and its next token for training and one for validation, but has "
            f"{len(source)}; give more text or a smaller data.sequence"
        )
    if split < least:
        raise DataError(
            f"data: data.validation={fraction:g} leaves {split} of {len(source)} tokens for "
            f"training, which needs at least {least}, one sequence of {sequence} and its next "
            f"token; give data.validation={0.99 * (1 - least / len(source)):.2g} or less"
        )
    start = source.document_start(split)
    return start if len(source) - start > max(held_out // 2, sequence) else split
