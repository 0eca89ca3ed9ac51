"""RMS-normalised projections and their derivative on the CPU: source/projection.cpp."""

import torch
from torch import Tensor

from manifold_hc.kernels.cpu.functions import FLOAT, INT64, POINTER, kernel, size
from manifold_hc.kernels.cpu.memory import empty

MHC_PROJECT = kernel(
    "mhc_project",
    v=POINTER,
    phi=POINTER,
    projected=POINTER,
    inverse_rms=POINTER,
    tokens=INT64,
    size=INT64,
    rows=INT64,
    norm_eps=FLOAT,
    is_bfloat16=INT64,
)

MHC_PROJECT_BACKWARD = kernel(
    "mhc_project_backward",
    grad=POINTER,
    v=POINTER,
    phi=POINTER,
    projected=POINTER,
    inverse_rms=POINTER,
    dv=POINTER,
    dphi=POINTER,
    partial_dphi=POINTER,
    tokens=INT64,
    size=INT64,
    rows=INT64,
    is_bfloat16=INT64,
)

MHC_SLICES = size("mhc_slices", tokens=INT64)
"""Number of slices that the tokens are cut into."""

MHC_SLICE_FLOATS = size("mhc_slice_floats", n=INT64, C=INT64, rows=INT64)
"""Floats in the partial gradient of phi that one slice sums."""


def project(v: Tensor, phi: Tensor, norm_eps: float) -> tuple[Tensor, Tensor]:
    """Return `v phi^T / rms(v)` [N, R] and 1 / rms(v) [N] of v [N, K] and phi [R, K]."""
    (N, K), R = v.shape, phi.shape[0]
    projected, inverse_rms = phi.new_empty(N, R), phi.new_empty(N)
    MHC_PROJECT(
        v=v,
        phi=phi,
        projected=projected,
        inverse_rms=inverse_rms,
        tokens=N,
        size=K,
        rows=R,
        norm_eps=norm_eps,
        is_bfloat16=v.dtype == torch.bfloat16,
    )
    return projected, inverse_rms


def project_backward(
    grad: Tensor, v: Tensor, phi: Tensor, projected: Tensor, inverse_rms: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of v, in v's dtype, and of phi."""
    (N, K), R = v.shape, phi.shape[0]
    # With dq = dp / rms: dv = dq phi - <dp, p> / (rms^2 K) v, dphi = dq^T v
    dv, dphi = empty(v, N, K), torch.empty_like(phi)
    MHC_PROJECT_BACKWARD(
        grad=grad,
        v=v,
        phi=phi,
        projected=projected,
        inverse_rms=inverse_rms,
        dv=dv,
        dphi=dphi,
        partial_dphi=partial_dphi(phi, N, 1, K),
        tokens=N,
        size=K,
        rows=R,
        is_bfloat16=v.dtype == torch.bfloat16,
    )
    return dv, dphi


def partial_dphi(phi: Tensor, tokens: int, n: int, channels: int) -> Tensor:
    """Return memory for the partial gradients of phi, one row a slice of tokens."""
    slices = MHC_SLICES(tokens=tokens)
    return empty(phi, slices, MHC_SLICE_FLOATS(n=n, C=channels, rows=phi.shape[0]))
