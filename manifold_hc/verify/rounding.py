"""Two checkpoints of which one is rounded to a narrower dtype: equal weights for both sides."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from manifold_hc.interop.layouts import Checkpoint
from manifold_hc.verify.orientation import oriented

NARROW = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes whose values a wider dtype may store."""


@dataclass(frozen=True)
class Rounded:
    """Two checkpoints after rounding where one is the rounded other."""

    own: Checkpoint
    other: Checkpoint
    dtypes: dict[str, str]
    """Dtype, such as bfloat16, of every parameter in which rounding changed a value."""

    @property
    def sentence(self) -> str:
        """Description for people; empty if nothing was rounded."""
        names = " and ".join(dict.fromkeys(self.dtypes.values()))
        return f"equal up to the rounding of {names} weights" if names else ""


def round_together(own: Checkpoint, other: Checkpoint) -> Rounded:
    """Give both checkpoints the narrower values where one is the rounding of the other.

    An entry counts as rounded if one side has the other's value in the narrower dtype, which is the
    one in which a file stores the parameter. In files of one dtype a narrower one is tried if whole
    parameters of one side are in it, the other side rounds to them, and most of their entries
    change: one changed entry of a parameter of ones is no rounding.

    Args:
        own: Connections of the first checkpoint.
        other: Connections that should be the same.

    Returns:
        Both with equal entries where rounding explains the difference; all others are unchanged.
    """
    ours, theirs = oriented(own, own.native), oriented(other, other.native)
    names = [
        name for name, value in ours.items() if name in theirs and theirs[name].shape == value.shape
    ]
    pairs = {name: (ours[name], theirs[name]) for name in names}
    dtypes = dict[str, str]()
    for dtype, chosen in (*_stored(pairs), *_cast(pairs)):
        for name in chosen:
            left, right, changed = _join(ours[name], theirs[name], dtype)
            ours[name], theirs[name] = left, right
            if changed:
                dtypes[name] = str(dtype).removeprefix("torch.")
    return Rounded(
        replace(own, native=oriented(own, ours)),
        replace(other, native=oriented(other, theirs)),
        dtypes,
    )


Pairs = dict[str, tuple[Tensor, Tensor]]


def _stored(pairs: Pairs) -> Iterator[tuple[torch.dtype, list[str]]]:
    """Yield the parameters whose two dtypes differ, each with the narrower one."""
    for name, (own, other) in pairs.items():
        if own.dtype != other.dtype:
            yield narrower(own.dtype, other.dtype), [name]


def _cast(pairs: Pairs) -> Iterator[tuple[torch.dtype, list[str]]]:
    """Yield each dtype to which parameters were rounded and stored in a wider one, with all."""
    for dtype in NARROW:
        chosen = [name for name, pair in pairs.items() if _is_cast(*pair, dtype)]
        changed = sum(int((pairs[name][0] != pairs[name][1]).sum()) for name in chosen)
        if 2 * changed > sum(pairs[name][0].numel() for name in chosen):
            yield dtype, list(pairs)


def _is_cast(own: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """True if the two differ, and one has the other's values rounded to the dtype."""
    if own.dtype != other.dtype or torch.equal(own, other):
        return False
    left, right = own.to(dtype).to(own.dtype), other.to(dtype).to(own.dtype)
    return torch.equal(left, right) and (torch.equal(left, own) or torch.equal(right, other))


def _join(own: Tensor, other: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, bool]:
    """Round the entries of which one is the other in the dtype; True if that changes one."""
    wide = torch.promote_types(own.dtype, other.dtype)
    rounded, same = own.to(dtype).to(wide), own.to(dtype) == other.to(dtype)
    own, other = own.to(wide), other.to(wide)
    same &= (own == rounded) | (other == rounded)
    changed = bool((same & (own != other)).any())
    return torch.where(same, rounded, own), torch.where(same, rounded, other), changed


def narrower(first: torch.dtype, second: torch.dtype) -> torch.dtype:
    """Return the dtype with the larger machine epsilon."""
    return max((first, second), key=lambda dtype: torch.finfo(dtype).eps)
