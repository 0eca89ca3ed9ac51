"""Calls that no fused kernel computes, in steps: static maps, other constraints, the reference.

`kernels` are the operators of a backend, or None for the reference.
"""

from collections.abc import Sequence

from torch import Tensor

from manifold_hc import reference
from manifold_hc.constraints import CONSTRAINTS
from manifold_hc.kernels.operators import Operators
from manifold_hc.kernels.values import InputNorm, WriteInputs
from manifold_hc.numerics import Numerics
from manifold_hc.reference import Coefficients


def coefficients(
    kernels: Operators | None,
    x: Tensor,
    phi: Tensor | None,
    alpha: Tensor | None,
    bias: Tensor,
    iterations: int,
    constraint: str,
    numerics: Numerics,
) -> Coefficients:
    """Compute `reference.coefficients`, projections and Sinkhorn by the kernels."""
    if kernels is None:
        return reference.coefficients(x, phi, alpha, bias, iterations, constraint, numerics)
    n, batch = x.shape[-2], x.shape[:-2]
    if phi is None or alpha is None:
        # Static maps are the same for every token: made once, then repeated.
        maps = _activate(kernels, bias, n, iterations, constraint, numerics)
        pre, post, res = (each.expand(*batch, *each.shape) for each in maps)
        return pre, post, res
    logits = reference.gate(kernels.project(x, phi, numerics.norm_eps), alpha, bias, n)
    return _activate(kernels, logits, n, iterations, constraint, numerics)


def _activate(
    kernels: Operators,
    logits: Tensor,
    n: int,
    iterations: int,
    constraint: str,
    numerics: Numerics,
) -> Coefficients:
    pre, post, res = reference.activate(logits, n, numerics)
    if constraint == "sinkhorn":
        return pre, post, kernels.sinkhorn(res.unflatten(-1, (n, n)), iterations, numerics)
    return pre, post, CONSTRAINTS[constraint].build(res, n, iterations, numerics)


def read(
    kernels: Operators | None, x: Tensor, pre: Tensor, input_norm: InputNorm | None = None
) -> Tensor:
    """Compute u, normalised if a norm is given."""
    u = reference.read(x, pre) if kernels is None else kernels.read(x, pre)
    if input_norm is None:
        return u
    return reference.normalise(u, input_norm.weight, input_norm.eps)


def write(kernels: Operators | None, inputs: WriteInputs, link: Tensor | None) -> Tensor:
    """Compute the next streams."""
    return reference.write(*inputs) if kernels is None else kernels.write(*inputs, link)


def rebuild(
    x: Tensor,
    writes: Sequence[tuple[Tensor, Tensor, Tensor]],
    reads: Sequence[Tensor],
    norms: Sequence[InputNorm | None],
) -> tuple[list[Tensor], list[Tensor]]:
    """Compute `functional.rebuild` by the reference."""
    streams = [x]
    for y, post, res in writes:
        streams.append(reference.write(streams[-1], y, post, res))
    inputs = [
        read(None, own, pre, norm) for own, pre, norm in zip(streams, reads, norms, strict=True)
    ]
    return streams[1:], inputs
