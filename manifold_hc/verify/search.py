"""Search for the convention that explains the results of an implementation."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from manifold_hc.verify.conventions import Convention
from manifold_hc.verify.evidence import Evidence

EPSILONS = (0.0, 1e-8, 2.0**-23, 1e-6, 1e-5, 1e-4)
"""Epsilons that implementations use; 2^-23 is the machine epsilon of float32."""

ITERATIONS = (1, 2, 3, 5, 10, 20, 40, 100)

DIRECTIONS = {
    "transposed": "res[o, i] = comb[i, o]",
    "as stored": "res[o, i] = comb[o, i]",
}

EXITS = {
    "mean": "the mean of the streams",
    "sum": "the sum of the streams",
    "learned": "a learned weighted sum",
    "pre": "weighted by the last sublayer's pre",
}


@dataclass(frozen=True)
class Change:
    """A convention with one detail changed."""

    values: tuple[tuple[str, Any], ...]
    """(field of `Convention`, value); several fields where one number appears in all of them."""
    sentence: str
    """Description of the changed detail."""

    def apply(self, convention: Convention) -> Convention:
        """Return the changed convention."""
        return replace(convention, **dict(self.values))

    @property
    def fields(self) -> set[str]:
        """Names of the changed fields."""
        return {name for name, _ in self.values}


@dataclass(frozen=True)
class Found:
    """Result of a search."""

    changes: tuple[Change, ...]
    excess: float
    """Largest error as a multiple of its tolerance, up to the first evidence that contradicts."""
    explained: int
    """Number of entries of the evidence before the first that contradicts; all where it fits."""

    @property
    def fits(self) -> bool:
        """True if the changed convention explains all evidence."""
        return self.excess <= 1

    @property
    def sentence(self) -> str:
        """Description of all changed details."""
        return ", and ".join(change.sentence for change in self.changes)


def changes(base: Convention) -> list[Change]:
    """Return every single change of the convention, the commonest defects first."""
    found = [
        _change(
            "direction",
            _other(base.direction, "transposed", "as stored"),
            lambda value: f"res is mixed in the other direction: {DIRECTIONS[value]}",
        ),
        _change(
            "last",
            _other(base.last, "rows", "columns"),
            lambda value: f"the Sinkhorn iterations end on the {value} of comb",
        ),
        _change(
            "norm_place",
            _other(base.norm_place, "inside", "outside"),
            lambda value: f"the epsilon of the norm is {value} the root",
        ),
        _change(
            "post_factor",
            1.0 if base.post_factor == 2 else 2.0,
            lambda value: f"the factor of post is {value:g}",
        ),
    ]
    found += [
        _change("exit", value, lambda value: f"the exit is {EXITS[value]}")
        for value in EXITS
        if value != base.exit
    ]
    found += list(_epsilons(base))
    found.append(
        _change(
            "start",
            _other(base.start, "softmax", "exp"),
            lambda value: f"the Sinkhorn iterations start with {value}",
        )
    )
    found += [
        _change("iterations", value, lambda value: f"there are {value} Sinkhorn iterations")
        for value in ITERATIONS
        if value != base.iterations
    ]
    return found


def search(base: Convention, evidence: Sequence[Evidence], most: int = 2) -> list[Found]:
    """Return the single changes that explain all evidence, else the pairs that do.

    most: largest number of changes at once, 1 or 2. If nothing fits, the one entry explains more of
    the evidence, from its first entry on, than all others, and has the least error on the next. The
    order of `evidence` decides the time: the first one should contradict `base`.
    """
    closest = Found((), math.inf, 0)
    for size in range(1, most + 1):
        fitting = []
        for chosen in combinations(changes(base), size):
            found = _judge(base, chosen, evidence)
            if found is None:
                continue
            if found.fits:
                fitting.append(found)
            elif (-found.explained, found.excess) < (-closest.explained, closest.excess):
                closest = found
        if fitting:
            return fitting
    return [closest]


def _judge(
    base: Convention, chosen: Sequence[Change], evidence: Sequence[Evidence]
) -> Found | None:
    """Apply the changes; None if two of them change the same field."""
    convention, fields = base, set[str]()
    for change in chosen:
        if fields & change.fields:
            return None
        fields |= change.fields
        convention = change.apply(convention)
    excess = 0.0
    for explained, one in enumerate(evidence):
        excess = max(excess, one.excess(convention))
        if excess > 1:
            return Found(tuple(chosen), excess, explained)
    return Found(tuple(chosen), excess, len(evidence))


def _epsilons(base: Convention) -> Iterator[Change]:
    """Yield every epsilon alone, then those that implementations set by one number."""
    start, denominator, pre = "start_eps", "denominator_eps", "pre_eps"
    for words, *fields in (
        ("added after the softmax of comb", start),
        ("of the norm", "norm_eps"),
        ("in the Sinkhorn denominators", denominator),
        ("added to pre", pre),
        ("after the softmax and in the Sinkhorn denominators", start, denominator),
        ("of pre and of Sinkhorn", start, denominator, pre),
    ):
        for value in EPSILONS:
            if any(getattr(base, field) != value for field in fields):
                number = f"{value:.3g}" if value else "absent"
                values = tuple((field, value) for field in fields)
                yield Change(values, f"the epsilon {words} is {number}")


def _change(field: str, value: Any, sentence: Any) -> Change:
    return Change(((field, value),), sentence(value))


def _other(value: str, first: str, second: str) -> str:
    return second if value == first else first
