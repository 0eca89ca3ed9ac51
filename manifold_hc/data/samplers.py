"""Which stretch of which source is the i-th sequence of a run: a function of i and the seed."""

from collections.abc import Sequence

import numpy as np

from manifold_hc.errors import ConfigError

PERIOD = 10_000
"""Sequences after which weighted sources repeat their turns: shares are exact to 1 in 20000."""


class EpochOrder:
    """Every sequence of all sources once an epoch, in an order drawn from `seed` and the epoch.

    A source of N tokens has N - 1 next tokens to predict; each is the target of exactly one
    sequence an epoch. What is left behind the last whole sequence of a source is a shorter one, at
    the end of the epoch.
    """

    def __init__(self, lengths: Sequence[int], sequence: int, seed: Sequence[int]) -> None:
        """lengths: tokens of every source; sequence: T; seed: numbers that the order depends on."""
        self.sequence = sequence
        self.seed = tuple(seed)
        counts = [(length - 1) // sequence for length in lengths]
        self._ends = np.cumsum(counts, dtype=np.int64)
        self.whole = int(self._ends[-1])
        self._tails = [
            (source, count * sequence)
            for source, (count, length) in enumerate(zip(counts, lengths, strict=True))
            if (length - 1) % sequence
        ]
        self.size = self.whole + len(self._tails)
        self._drawn: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def __getitem__(self, index: int) -> tuple[int, int]:
        """(source, first token) of sequence `index`, counted over all epochs."""
        epoch, place = divmod(index, self.size)
        if place >= self.whole:
            return self._tails[place - self.whole]
        number = int(self._permutation(epoch)[place])
        source = int(np.searchsorted(self._ends, number, side="right"))
        before = int(self._ends[source - 1]) if source else 0
        return source, (number - before) * self.sequence

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._drawn[0] != epoch:
            order = np.random.default_rng((*self.seed, epoch)).permutation(self.whole)
            self._drawn = (epoch, order)
        return self._drawn[1]


class WeightedOrder:
    """Sources take turns by weight; each goes through its own epochs.

    Any stretch holds each source's share to within about one sequence a source.
    """

    def __init__(
        self, lengths: Sequence[int], sequence: int, seed: int, weights: Sequence[float]
    ) -> None:
        """Raises ConfigError for a weight below 1 in `PERIOD` of all."""
        share = np.array(weights) / sum(weights) * PERIOD
        quota = np.floor(share).astype(np.int64)
        quota[np.argsort(quota - share, kind="stable")[: PERIOD - quota.sum()]] += 1
        if not quota.all():
            least = weights[int(quota.argmin())]
            raise ConfigError(f"data.weights: {least} is below 1 in {PERIOD} of all; leave it out")
        turns = np.concatenate([(np.arange(q) + 0.5) / q for q in quota])
        self._source = np.repeat(np.arange(len(quota)), quota)[np.argsort(turns, kind="stable")]
        self._rank = np.zeros(PERIOD, dtype=np.int64)
        for source, count in enumerate(quota):
            self._rank[self._source == source] = np.arange(count)
        self._quota = quota
        self._orders = [
            EpochOrder([length], sequence, (seed, source)) for source, length in enumerate(lengths)
        ]
        self.whole = sum(order.whole for order in self._orders)

    def __getitem__(self, index: int) -> tuple[int, int]:
        """(source, first token) of sequence `index`."""
        period, place = divmod(index, PERIOD)
        source = int(self._source[place])
        number = period * int(self._quota[source]) + int(self._rank[place])
        return source, self._orders[source][number][1]
