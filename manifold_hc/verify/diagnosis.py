"""Explanation of differences: another convention, or other weights."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from manifold_hc.verify.conventions import Convention
from manifold_hc.verify.evidence import Evidence
from manifold_hc.verify.observation import EXIT
from manifold_hc.verify.search import Found, search

SHOWN = 3
"""Largest number of sublayers or conventions that a sentence lists."""


@dataclass(frozen=True)
class Diagnosis:
    """Explanation of the differences between two implementations."""

    verdict: Literal["convention", "weights", "unknown"]
    """Another convention fits all sublayers; some sublayers have other weights; or neither."""
    sentences: list[str]
    """The explanation for people."""


def diagnose(
    base: Convention | None, evidence: Sequence[Evidence], differing: Sequence[tuple[int, str]]
) -> Diagnosis:
    """Explain the differences.

    Args:
        base: Convention of the stack; None where the family of conventions has none.
        evidence: Every sublayer, and the exit if it is compared.
        differing: (index, tensor) of all results that differ.

    Returns:
        The verdict and its sentences.
    """
    indices = {index for index, _ in differing}
    bad = [one for one in evidence if one.observation.index in indices]
    good = [one for one in evidence if one.observation.index not in indices]
    some_agree = any(one.observation.index != EXIT for one in good)
    found: list[Found] = []
    if base is not None:
        # Two changes that show in some sublayers alone are not worth the time of all pairs.
        found = search(base, bad + good, most=1 if some_agree else 2)
        if found[0].fits:
            return Diagnosis("convention", _fitting(found, f"fits {_all(evidence)}"))
    if some_agree:
        return _other_weights(base, bad, good, differing)
    if base is None:
        return Diagnosis("unknown", ["these connections have no other convention to compare with"])
    return _separately(base, bad + good, found[0], indices)


def _separately(
    base: Convention, evidence: Sequence[Evidence], closest: Found, differing: Collection[int]
) -> Diagnosis:
    """No convention fits everywhere: explain the sublayers alone, and the exit alone."""
    sublayers = [one for one in evidence if one.observation.index != EXIT]
    exits = [one for one in evidence if one.observation.index == EXIT]
    if sublayers and exits and closest.explained == len(sublayers):
        found = search(base, sublayers)
        sentences = _fitting(found, f"fits {_all(sublayers)}, but not the exit")
        return Diagnosis("convention", sentences + _exit_alone(base, exits, differing))
    sentences = [f"no convention fits {_all(evidence)}", *_closest(closest, evidence)]
    if sublayers and exits:
        sentences += _exit_alone(base, exits, differing)
    return Diagnosis("unknown", sentences)


def _exit_alone(
    base: Convention, exits: Sequence[Evidence], differing: Collection[int]
) -> list[str]:
    """Describe the exit where its convention is not that of the sublayers."""
    if EXIT not in differing:
        return ["the exit agrees as it is"]
    found = search(base, exits, most=1)
    if found[0].fits:
        return _fitting(found, "fits the exit, but not the sublayers")
    return ["no convention fits the exit"]


def _closest(closest: Found, evidence: Sequence[Evidence]) -> list[str]:
    """Describe the convention that explains most of the evidence, and the error that is left."""
    if not closest.changes:
        return []
    name = _name(evidence[closest.explained])
    left = f"the error that is left is {closest.excess:.1g} times the tolerance"
    if not closest.explained:
        return [f"closest on {name}: {closest.sentence}; {left}"]
    fitting = _names(evidence[: closest.explained])
    return [f"{closest.sentence}; fits {fitting}, but on {name} {left}"]


def _other_weights(
    base: Convention | None,
    bad: Sequence[Evidence],
    good: Sequence[Evidence],
    differing: Sequence[tuple[int, str]],
) -> Diagnosis:
    """Some sublayers agree, so the model's convention is right."""
    agreeing = f"{len(good)} of {len(bad) + len(good)} agree"
    verb = "differs" if len(bad) == 1 else "differ"
    first = f"{_names(bad)} alone {verb} and {agreeing}: the weights differ, not the convention"
    sentences = [first, _where(bad[0], {name for i, name in differing if i == differing[0][0]})]
    alone = search(base, bad, most=1) if base is not None else []
    if alone and alone[0].fits:
        sentences += _fitting(alone, f"would fit {_names(bad)} too, but no other sublayer")
    return Diagnosis("weights", sentences)


def _fitting(found: Sequence[Found], end: str) -> list[str]:
    """Describe the conventions that fit, of which some may have equal effects."""
    sentences = [f"{one.sentence}; {end}" for one in found[:SHOWN]]
    if len(found) > SHOWN:
        sentences.append(f"{len(found) - SHOWN} more conventions fit within the tolerance")
    return sentences


def _where(first: Evidence, tensors: set[str]) -> str:
    """Name the parameters that the differing results of one sublayer depend on."""
    index = first.observation.index
    rows: list[str] = [name for name in ("pre", "post", "res") if name in tensors]
    if not rows and tensors == {"new"}:
        rows = ["post or res"]
    elif not rows:
        # In single pass a sublayer reads with the pre of the one before.
        late = first.single_pass and first.before is not None
        if index == EXIT and not late:
            return "look at phi, bias and alpha of the exit"
        reader = first.before.observation.index if first.before and late else index
        rest = " and its post or res rows" if "new" in tensors else ""
        return f"look at the pre rows of phi and bias, and at alpha, of sublayer {reader}{rest}"
    return f"look at the {' and '.join(rows)} rows of phi and bias, and at alpha, of {_name(first)}"


def _all(evidence: Sequence[Evidence]) -> str:
    sublayers = sum(one.observation.index != EXIT for one in evidence)
    words = f"all {sublayers} sublayers" if sublayers != 1 else "the one sublayer"
    return f"{words} and the exit" if sublayers < len(evidence) else words


def _name(one: Evidence) -> str:
    index = one.observation.index
    return "the exit" if index == EXIT else f"sublayer {index}"


def _names(evidence: Sequence[Evidence]) -> str:
    names = [_name(one) for one in evidence[:SHOWN]]
    if len(evidence) > SHOWN:
        names.append(f"{len(evidence) - SHOWN} more")
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
