"""Compare a stack with another implementation, tensor by tensor, and say why they differ."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from manifold_hc.stack import Stack
from manifold_hc.verify import conventions
from manifold_hc.verify.diagnosis import Diagnosis, diagnose
from manifold_hc.verify.evidence import Evidence, relative_error, weights_of
from manifold_hc.verify.forward import Forward
from manifold_hc.verify.observation import EXIT, Observation, Source

EXACT = 1e-10
"""Tolerance between two computations in float64."""

NOISE = 8.0
"""Tolerance below float64, as a multiple of the error that our reference makes in float32."""

ROUNDINGS = 4.0
"""Least tolerance below float64, in machine epsilons of the tensor's dtype."""


@dataclass(frozen=True)
class Compared:
    """One tensor of one sublayer, or of the exit."""

    index: int
    """Sublayer, or -1 for the exit."""
    tensor: str
    error: float
    """Largest error of a token over its largest entry."""
    tolerance: float

    @property
    def ok(self) -> bool:
        """True if the error is within the tolerance; false for NaN."""
        return self.error <= self.tolerance


@dataclass
class Report:
    """Result of a comparison."""

    source: str
    """Implementation that the stack was compared with."""
    precision: str
    """Precision that the tolerances are for."""
    sublayers: int
    """Number of sublayers of the stack."""
    compared: list[Compared]
    """Every tensor, in the order of the computation."""
    diagnosis: Diagnosis | None = None
    """Explanation of the differences; None if there are none."""

    @property
    def differing(self) -> list[Compared]:
        """Tensors that differ by more than their tolerance."""
        return [one for one in self.compared if not one.ok]

    @property
    def ok(self) -> bool:
        """True if nothing differs."""
        return not self.differing


def compare(stack: Stack, source: Source) -> Report:
    """Compare every sublayer of the stack with the source, each on its own inputs.

    Errors do not accumulate over the depth, so the first sublayer that is reported is the first
    that differs. Ours is computed in float64. A source in float64 whose sublayers are all off by no
    more than the rounding of float32 computes in float32, whatever its tensors' dtype: it is then
    compared as such.

    Args:
        stack: The whole stack, with the weights of the model.
        source: Results of the other implementation.

    Returns:
        The report; its diagnosis explains the differences.
    """
    measured = _measure(stack, source)
    report = _report(stack, source.name, source.precision, measured)
    # One weight that differs leaves the other sublayers equal in float64; rounding does not.
    everywhere = {one.index for one in report.differing if one.index != EXIT}
    explained = report.diagnosis is not None and report.diagnosis.verdict == "convention"
    if source.precision != torch.float64 or explained or len(everywhere) < report.sublayers:
        return report
    narrow = _report(stack, source.name, torch.float32, measured)
    return narrow if narrow.ok else report


class _Measured(NamedTuple):
    """One observation with the errors of its results."""

    observation: Observation
    errors: dict[str, float]
    """Error against our forward in float64."""
    noise: dict[str, float]
    """Error of our reference in float32."""


def _measure(stack: Stack, source: Source) -> list[_Measured]:
    exact = Forward(stack, backend="reference")
    narrow = Forward(stack, torch.float32, backend="reference")
    measured = list[_Measured]()
    for observed in source.observations():
        before = None
        if measured and observed.follows(measured[-1].observation):
            before = measured[-1].observation.inputs.x
        wanted = exact.results(observed.index, observed.inputs, before)
        rounded = narrow.results(observed.index, observed.inputs, before)
        names = [name for name in wanted if name in observed.results]
        measured.append(
            _Measured(
                observed,
                {name: relative_error(observed.results[name], wanted[name]) for name in names},
                {name: relative_error(rounded[name], wanted[name]) for name in names},
            )
        )
    return measured


def _report(
    stack: Stack, name: str, precision: torch.dtype, measured: Sequence[_Measured]
) -> Report:
    """Judge the errors by the tolerances of a precision, and explain the differences."""
    tolerances = [
        {
            tensor: _tolerance(precision, one.observation.results[tensor].dtype, noise)
            for tensor, noise in one.noise.items()
        }
        for one in measured
    ]
    compared = [
        Compared(one.observation.index, tensor, one.errors[tensor], tolerance)
        for one, own in zip(measured, tolerances, strict=True)
        for tensor, tolerance in own.items()
    ]
    label = str(precision).removeprefix("torch.")
    report = Report(name, label, len(stack.connections), compared)
    if not report.ok:
        differing = [(one.index, one.tensor) for one in report.differing]
        evidence = _evidence(stack, [one.observation for one in measured], tolerances)
        report.diagnosis = diagnose(conventions.of(stack.config), evidence, differing)
    return report


def _evidence(
    stack: Stack, observations: Sequence[Observation], tolerances: Sequence[dict[str, float]]
) -> list[Evidence]:
    """Join every observation with the stack's parameters and with the sublayer before."""
    found: list[Evidence] = []
    for observed, own in zip(observations, tolerances, strict=True):
        follows = found and observed.follows(found[-1].observation)
        before = found[-1] if follows else None
        weights = weights_of(stack, observed.index)
        found.append(Evidence(observed, own, weights, before, stack.config.is_single_pass))
    return found


def _tolerance(precision: torch.dtype, dtype: torch.dtype, noise: float) -> float:
    if precision == torch.float64 and dtype == torch.float64:
        return EXACT
    narrowest = max((precision, dtype), key=lambda one: torch.finfo(one).eps)
    return max(ROUNDINGS * torch.finfo(narrowest).eps, NOISE * noise)
