"""Outputs and all gradients of an implementation against float64, before anything is timed."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from manifold_hc.bench.peers.implementations import Implementation
from manifold_hc.bench.problem import Inputs

TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 2e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 3e-3,
}
"""Largest relative error allowed, by dtype of the tensor."""


class Comparison(NamedTuple):
    """Result of comparing several tensors with their exact values."""

    error: float
    """Relative error of the worst tensor."""
    tolerance: float
    worst: str
    """Name of that tensor."""

    @property
    def share(self) -> float:
        """Error as a share of the tolerance."""
        return self.error / self.tolerance

    @property
    def ok(self) -> bool:
        """True if the error is within the tolerance; false for NaN."""
        return self.error <= self.tolerance


def check(implementation: Implementation, inputs: Inputs) -> Comparison:
    """Run the implementation and its float64 oracle on the same inputs and compare all tensors."""
    found, wanted = implementation.task(inputs), implementation.oracle_task(inputs)
    parameters = enumerate(implementation.parameters)
    names = ["u", "x'", "x.grad", "y.grad", "grad of scalars"]
    names += [f"grad of parameter {i}" for i, p in parameters if p.numel() > 1]
    return compare(
        _join_scalars(found.tensors()),
        _join_scalars(wanted.tensors()),
        names,
        lambda tensor: TOLERANCE[inputs.x.dtype],
    )


def compare(
    found: Sequence[Tensor],
    wanted: Sequence[Tensor],
    names: Sequence[str],
    tolerance: Callable[[Tensor], float],
) -> Comparison:
    """Find the tensor whose relative error is the largest share of its tolerance."""
    comparisons = [
        Comparison(relative_error(own, exact), tolerance(own), name)
        for own, exact, name in zip(found, wanted, names, strict=True)
    ]
    return max(comparisons, key=lambda comparison: comparison.share)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest entry of `wanted`; infinite for NaN or another shape."""
    if found.shape != wanted.shape:
        return math.inf
    if not wanted.numel():
        return 0.0
    scale = wanted.abs().max().clamp_min(torch.finfo(wanted.dtype).tiny)
    error = float((found.to(wanted.dtype) - wanted).abs().max() / scale)
    return math.inf if math.isnan(error) else error


def _join_scalars(tensors: list[Tensor]) -> list[Tensor]:
    """Outputs, gradients of x and y, gradients of scalars as one vector, other gradients.

    The gradient of a gate sums over all tokens and can cancel to nearly zero: its error is relative
    to the largest scalar gradient, as for the entries of alpha.
    """
    first, parameters = tensors[:4], tensors[4:]
    scalars = [p.flatten() for p in parameters if p.numel() == 1]
    joined = torch.cat(scalars) if scalars else first[0].new_zeros(0)
    return [*first, joined, *(p for p in parameters if p.numel() > 1)]
