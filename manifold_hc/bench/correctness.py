"""Correctness before speed: outputs and all gradients against float64."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from manifold_hc.bench.peers.implementations import Candidate
from manifold_hc.bench.problem import Inputs

TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 2e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 3e-3,
}
"""Largest error allowed of any tensor, as a share of its largest entry."""


class Verdict(NamedTuple):
    """What the gate found."""

    error: float
    """Largest over outputs and gradients, as a share of that tensor's largest entry."""
    tolerance: float
    worst: str
    """The tensor it was found in."""

    @property
    def ok(self) -> bool:
        """Not so for NaN."""
        return self.error <= self.tolerance


def check(candidate: Candidate, inputs: Inputs) -> Verdict:
    """Run the candidate and its oracle on the same numbers and compare every tensor."""
    found, wanted = candidate.task(inputs).tensors(), candidate.judge(inputs).tensors()
    names = ["u", "x'", "x.grad", "y.grad", "grad of scalars"]
    names += [f"grad of parameter {i}" for i, p in enumerate(candidate.parameters) if p.numel() > 1]
    return judge(_join_scalars(found), _join_scalars(wanted), names, TOLERANCE[inputs.x.dtype])


def judge(
    found: Sequence[Tensor], wanted: Sequence[Tensor], names: Sequence[str], tolerance: float
) -> Verdict:
    """The largest relative error of several tensors."""
    errors = [relative_error(a, b) for a, b in zip(found, wanted, strict=True)]
    worst = max(range(len(errors)), key=errors.__getitem__)
    return Verdict(errors[worst], tolerance, names[worst])


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
    """Outputs and gradients of x and y, the gradients of scalars as one vector, the others.

    A gate's gradient is a sum over all tokens that can cancel to nearly nothing: it is judged by
    the largest of its kind, as alpha is.
    """
    ahead, parameters = tensors[:4], tensors[4:]
    scalars = [p.flatten() for p in parameters if p.numel() == 1]
    joined = torch.cat(scalars) if scalars else ahead[0].new_zeros(0)
    return [*ahead, joined, *(p for p in parameters if p.numel() > 1)]
