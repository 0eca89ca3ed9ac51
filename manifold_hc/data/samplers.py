"""Samplers: the source and first token of the i-th sequence of a run, a function of i and seed."""

from collections.abc import Sequence

import numpy as np

from manifold_hc.errors import ConfigError

PERIOD = 10_000
"""Sequences after which the order of weighted sources repeats: shares are exact to 1 in 20000."""


class EpochSampler:
    """Every sequence of all sources once an epoch, shuffled by `seed` and the epoch.

    A source of N tokens has N - 1 next tokens to predict; each is the target of exactly one
    sequence an epoch. The tokens after the last whole sequence of a source form a shorter sequence,
    at the end of the epoch.
    """

    def __init__(self, lengths: Sequence[int], sequence: int, seed: Sequence[int]) -> None:
        """lengths: tokens of every source; sequence: T; seed: integers that seed the shuffle."""
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
        self._cached: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def __getitem__(self, index: int) -> tuple[int, int]:
        """Return (source, first token) of sequence `index`, counted over all epochs."""
        epoch, position = divmod(index, self.size)
        if position >= self.whole:
            return self._tails[position - self.whole]
        number = int(self._permutation(epoch)[position])
        source = int(np.searchsorted(self._ends, number, side="right"))
        before = int(self._ends[source - 1]) if source else 0
        return source, (number - before) * self.sequence

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._cached[0] != epoch:
            permutation = np.random.default_rng((*self.seed, epoch)).permutation(self.whole)
            self._cached = (epoch, permutation)
        return self._cached[1]


class WeightedSampler:
    """Sources interleaved by weight; each has epochs of its own.

    In any range of sequences the number of a source's sequences is within about one of its share.
    """

    def __init__(
        self, lengths: Sequence[int], sequence: int, seed: int, weights: Sequence[float]
    ) -> None:
        """weights: shares; raises ConfigError for one below 1 / `PERIOD` of their sum."""
        share = np.array(weights) / sum(weights) * PERIOD
        # Largest remainders: the quotas of a period are integers and add up to PERIOD.
        quota = np.floor(share).astype(np.int64)
        quota[np.argsort(quota - share, kind="stable")[: PERIOD - quota.sum()]] += 1
        if not quota.all():
            least = weights[int(quota.argmin())]
            raise ConfigError(f"data.weights: {least} is below 1 in {PERIOD} of all; leave it out")
        # Each source's sequences are spread evenly over the period.
        times = np.concatenate([(np.arange(q) + 0.5) / q for q in quota])
        self._source = np.repeat(np.arange(len(quota)), quota)[np.argsort(times, kind="stable")]
        self._rank = np.zeros(PERIOD, dtype=np.int64)
        for source, count in enumerate(quota):
            self._rank[self._source == source] = np.arange(count)
        self._quota = quota
        self._samplers = [
            EpochSampler([length], sequence, (seed, source))
            for source, length in enumerate(lengths)
        ]
        self.whole = sum(sampler.whole for sampler in self._samplers)

    def __getitem__(self, index: int) -> tuple[int, int]:
        """Return (source, first token) of sequence `index`."""
        period, position = divmod(index, PERIOD)
        source = int(self._source[position])
        number = period * int(self._quota[source]) + int(self._rank[position])
        return source, self._samplers[source][number][1]
