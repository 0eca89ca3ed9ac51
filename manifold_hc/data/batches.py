"""Batches of sequences, the same for everybody who asks for the same step."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from manifold_hc.errors import DataError


@dataclass(frozen=True)
class Split:
    """Training and validation tokens [N] of one text, cut at one place."""

    training: np.ndarray
    validation: np.ndarray

    @classmethod
    def of(cls, tokens: np.ndarray, sequence: int, fraction: float) -> "Split":
        """The last `fraction` of the text, and at least one sequence, is for validation.

        Raises DataError when either part is shorter than one sequence and its next token.
        """
        held_out = max(round(len(tokens) * fraction), sequence + 1)
        if len(tokens) - held_out < sequence + 1:
            raise DataError(
                f"data: the text must have at least {2 * (sequence + 1)} tokens, one sequence of "
                f"{sequence} and its next token for training and one for validation, but has "
                f"{len(tokens)}; give more text or a smaller data.sequence"
            )
        return cls(tokens[:-held_out], tokens[-held_out:])


class Batches:
    """Consecutive sequences of a text, each seen once an epoch in an order drawn from `seed`.

    A batch depends on `seed` and its number alone: runs can be compared, and resumed anywhere.
    """

    def __init__(self, tokens: np.ndarray, sequence: int, batch: int, seed: int) -> None:
        """tokens: [N]; sequence: T; batch: B. A tail shorter than a sequence is left out."""
        self.tokens = tokens
        self.sequence = sequence
        self.batch = batch
        self.seed = seed
        self.count = (len(tokens) - 1) // sequence
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def __getitem__(self, number: int) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
        """Inputs and next tokens of batch `number`, counted from 0 over all epochs; int64."""
        starts = [
            self._permutation(index // self.count)[index % self.count] * self.sequence
            for index in range(number * self.batch, (number + 1) * self.batch)
        ]
        rows = np.stack([self.tokens[start : start + self.sequence + 1] for start in starts])
        tokens = torch.from_numpy(rows.astype(np.int64))
        return tokens[:, :-1], tokens[:, 1:]

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.count)
            self._order = (epoch, order)
        return self._order[1]
