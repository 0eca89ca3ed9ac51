"""A second checkpoint that should hold the same model: weights after conversion, and results."""

from dataclasses import dataclass
from typing import cast

from torch import Tensor

from manifold_hc.errors import CheckpointError
from manifold_hc.interop.layouts import Checkpoint
from manifold_hc.verify.forward import StackSource
from manifold_hc.verify.observation import Inputs
from manifold_hc.verify.orientation import oriented
from manifold_hc.verify.rounding import narrower


@dataclass(frozen=True)
class WeightDifference:
    """Entries of one parameter in which two checkpoints differ."""

    name: str
    """Name in `Stack.state_dict()`."""
    entries: int
    """Number of entries that differ."""
    size: int
    """Number of entries."""
    first: tuple[int, ...]
    """Index of the first that differs; n*n rows are res[o, i], row-major."""
    own: float
    other: float

    @property
    def sentence(self) -> str:
        """Description for people."""
        return (
            f"{self.name}: {self.entries} of {self.size} entries differ, the first is "
            f"{list(self.first)}: {self.own:.9g} against {self.other:.9g}"
        )


def differing_weights(own: Checkpoint, other: Checkpoint) -> list[WeightDifference]:
    """Compare the connections of two checkpoints, entry by entry.

    An entry differs if it is not the value that the narrower of the two dtypes rounds it to.
    Raises CheckpointError if they have other streams, channels, sublayers or exits.
    """
    ours, theirs = _sizes(own), _sizes(other)
    if ours != theirs:
        raise CheckpointError(
            f"{other.files.path}: must have {_text(ours)}, as {own.files.path}, but has "
            f"{_text(theirs)}"
        )
    left, right = oriented(own, own.native), oriented(other, other.native)
    if lacking := sorted(left.keys() ^ right.keys()):
        where = own if lacking[0] in right else other
        raise CheckpointError(f"{where.files.path}: has no {lacking[0]}, which the other one has")
    found = (_difference(name, value, right[name]) for name, value in left.items())
    return [one for one in found if one is not None]


def second_checkpoint(own: Checkpoint, other: Checkpoint, tokens: int, seed: int) -> StackSource:
    """Return the other checkpoint's forward pass on random inputs."""
    inputs = Inputs(tokens, own.config.n, own.channels, seed)
    return StackSource(other.stack(), inputs, f"{other.files.path}, {other.layout.name}")


def _difference(name: str, own: Tensor, other: Tensor) -> WeightDifference | None:
    narrow = narrower(own.dtype, other.dtype)
    wrong = (own.to(narrow) != other.to(narrow)).nonzero()
    if not len(wrong):
        return None
    first = tuple(cast(list[int], wrong[0].tolist()))
    return WeightDifference(
        name, len(wrong), own.numel(), first, float(own[first]), float(other[first])
    )


def _sizes(checkpoint: Checkpoint) -> tuple[int, int, int]:
    return checkpoint.config.n, checkpoint.channels, checkpoint.sublayers


def _text(sizes: tuple[int, int, int]) -> str:
    return "{} streams, {} channels and {} sublayers".format(*sizes)
