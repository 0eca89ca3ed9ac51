"""Tensors of one sublayer as an implementation computed them, and the sources of such tensors."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

EXIT = -1
"""Index that stands for the exit of the network."""

SUBLAYER_TENSORS = ("pre", "post", "res", "u", "new")
"""Results of a sublayer in the order of their computation; `new` is the streams after it."""


class Streams(NamedTuple):
    """Inputs of one sublayer."""

    x: Float[Tensor, "N n C"]
    """Streams before the sublayer."""
    y: Float[Tensor, "N C"] | None
    """Output of its branch; None for the exit."""


@dataclass(frozen=True)
class Observation:
    """Inputs and results of one sublayer, or of the exit: x and h."""

    index: int
    """Sublayer, or EXIT."""
    inputs: Streams
    results: dict[str, Tensor]
    """Any of `SUBLAYER_TENSORS`, or h [N, C] of the exit; N tokens in all."""

    def follows(self, other: "Observation") -> bool:
        """True if `other` is the sublayer before this one; every sublayer is before the exit."""
        return self.index in (EXIT, other.index + 1)


@runtime_checkable
class Source(Protocol):
    """An implementation whose results can be compared with ours."""

    @property
    def name(self) -> str:
        """Name for the user."""

    @property
    def precision(self) -> torch.dtype:
        """Dtype in which the implementation computes."""

    def observations(self) -> Iterator[Observation]:
        """Yield every sublayer in depth order, then the exit if it was computed."""


@dataclass(frozen=True)
class Inputs:
    """Random streams and branch outputs: the same for every implementation."""

    tokens: int = 16
    streams: int = 4
    channels: int = 64
    seed: int = 0
    dtype: torch.dtype = torch.float64
    """Dtype in which the implementation takes them; the values are exact in it."""

    def of(self, index: int) -> Streams:
        """Draw the inputs of one sublayer, or of the exit.

        The root mean square of a token runs from 0.01 to 10, so that the epsilon of the norm and
        its place matter.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index + 1)
        scale = torch.logspace(-2, 1, self.tokens).view(-1, 1, 1)
        x = torch.randn(self.tokens, self.streams, self.channels, generator=generator) * scale
        y = torch.randn(self.tokens, self.channels, generator=generator) * scale[:, 0]
        return Streams(x.to(self.dtype), None if index == EXIT else y.to(self.dtype))
