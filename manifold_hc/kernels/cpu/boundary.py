"""Write, coefficients and read between two sublayers on the CPU, and their derivative.

source/boundary.cpp and source/boundary_backward.cpp. Coefficients without a write or without a read
are the same two functions with null pointers.
"""

import torch
from torch import Tensor

from manifold_hc.kernels.cpu.functions import FLOAT, INT64, POINTER, kernel
from manifold_hc.kernels.cpu.memory import empty
from manifold_hc.kernels.cpu.project import partial_dphi
from manifold_hc.kernels.values import (
    BoundaryGradients,
    ComputedMaps,
    InputNorm,
    MapParameters,
    ReadingGradients,
    SavedBoundary,
    SavedMaps,
    Settings,
    WriteInputs,
)

CONSTRAINT_NUMBERS = {"sinkhorn": 0, "identity": 1, "none": 2}
"""Numbers of the constraints, as source/coefficients.h has them."""

MHC_BOUNDARY = kernel(
    "mhc_boundary",
    x=POINTER,
    y=POINTER,
    post=POINTER,
    res=POINTER,
    pre=POINTER,
    weight=POINTER,
    input_eps=FLOAT,
    streams=POINTER,
    phi=POINTER,
    alpha=POINTER,
    bias=POINTER,
    u=POINTER,
    new_pre=POINTER,
    new_post=POINTER,
    new_res=POINTER,
    projected=POINTER,
    inverse_rms=POINTER,
    tokens=INT64,
    n=INT64,
    C=INT64,
    rows=INT64,
    constraint=INT64,
    iterations=INT64,
    transposed=INT64,
    norm_eps=FLOAT,
    hc_eps=FLOAT,
    x_is_bfloat16=INT64,
    y_is_bfloat16=INT64,
)

MHC_BOUNDARY_BACKWARD = kernel(
    "mhc_boundary_backward",
    grad_streams=POINTER,
    grad_u=POINTER,
    grad_pre=POINTER,
    grad_post=POINTER,
    grad_res=POINTER,
    grad_link=POINTER,
    x=POINTER,
    y=POINTER,
    post=POINTER,
    pre=POINTER,
    phi=POINTER,
    alpha=POINTER,
    bias=POINTER,
    weight=POINTER,
    input_eps=FLOAT,
    res=POINTER,
    projected=POINTER,
    inverse_rms=POINTER,
    dx=POINTER,
    dy=POINTER,
    dpost=POINTER,
    dpre=POINTER,
    dphi=POINTER,
    dbias_dalpha=POINTER,
    dweight=POINTER,
    partial_dphi=POINTER,
    partial_dbias_dalpha=POINTER,
    partial_dweight=POINTER,
    tokens=INT64,
    n=INT64,
    C=INT64,
    rows=INT64,
    constraint=INT64,
    iterations=INT64,
    transposed=INT64,
    norm_eps=FLOAT,
    hc_eps=FLOAT,
    learns=INT64,
    x_is_bfloat16=INT64,
    y_is_bfloat16=INT64,
)


def coefficients(x: Tensor, maps: MapParameters, settings: Settings) -> ComputedMaps:
    """Return the maps of x [N, n, C]."""
    return _maps_of(x, None, None, maps, None, settings, None)


def coefficients_and_read(
    x: Tensor, maps: MapParameters, settings: Settings
) -> tuple[Tensor, ComputedMaps]:
    """Return u [N, C] and the maps of x [N, n, C]."""
    u = empty(x, x.shape[0], x.shape[2])
    return u, _maps_of(x, None, None, maps, None, settings, u)


def boundary(
    write: WriteInputs,
    pre: Tensor | None,
    maps: MapParameters,
    norm: InputNorm | None,
    settings: Settings,
) -> tuple[Tensor, Tensor, ComputedMaps]:
    """Return the written streams [N, n, C], u [N, C] and the maps of the written streams.

    pre: read weights [N, n]; None to read with the new ones.
    """
    # The kernel writes into `written`, then reads it while it is in cache.
    x = write.x
    written, u = empty(x, *x.shape), empty(x, x.shape[0], x.shape[2])
    return written, u, _maps_of(written, write, pre, maps, norm, settings, u)


def _maps_of(
    streams: Tensor,
    write: WriteInputs | None,
    pre: Tensor | None,
    maps: MapParameters,
    norm: InputNorm | None,
    settings: Settings,
    u: Tensor | None,
) -> ComputedMaps:
    """Return the maps of `streams`, which `write` fills first, and fill u unless it is None."""
    (N, n, C), R, new = streams.shape, maps.phi.shape[0], maps.phi.new_empty
    made = ComputedMaps(new(N, n), new(N, n), new(N, n, n), new(N, R), new(N))
    MHC_BOUNDARY(
        x=None if write is None else write.x,
        y=None if write is None else write.y,
        post=None if write is None else write.post,
        res=None if write is None else write.res,
        pre=pre,
        weight=None if norm is None else norm.weight,
        input_eps=0.0 if norm is None else norm.eps,
        streams=streams,
        phi=maps.phi,
        alpha=maps.alpha,
        bias=maps.bias,
        u=u,
        new_pre=made.pre,
        new_post=made.post,
        new_res=made.res,
        projected=made.projected,
        inverse_rms=made.inverse_rms,
        tokens=N,
        n=n,
        C=C,
        rows=R,
        constraint=CONSTRAINT_NUMBERS[settings.constraint],
        iterations=settings.iterations,
        transposed=settings.transposed,
        norm_eps=settings.norm_eps,
        hc_eps=settings.hc_eps,
        x_is_bfloat16=streams.dtype == torch.bfloat16,
        y_is_bfloat16=write is not None and write.y.dtype == torch.bfloat16,
    )
    return made


def coefficients_and_read_backward(
    grads: ReadingGradients,
    x: Tensor,
    maps: MapParameters,
    saved: SavedMaps,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, phi, alpha and bias."""
    boundary = SavedBoundary(written=x, y=None, post=None, pre=None)
    found = boundary_backward(None, grads, boundary, maps, None, saved, settings)
    return found.written, found.phi, found.alpha, found.bias


def boundary_backward(
    grad_written: Tensor | None,
    grads: ReadingGradients,
    boundary: SavedBoundary,
    maps: MapParameters,
    norm: InputNorm | None,
    saved: SavedMaps,
    settings: Settings,
) -> BoundaryGradients:
    """Return the gradients of all inputs."""
    written, y, post, pre = boundary
    phi = maps.phi
    (N, n, C), R = written.shape, phi.shape[0]
    weight = None if norm is None else norm.weight
    # Sums over tokens: one partial sum a slice, added in order, so that threads do not change bits.
    partial = partial_dphi(phi, N, n, C)
    dx, dy = empty(written, N, n, C), None if y is None else empty(y, N, C)
    dpost, dpre, dweight = (None if t is None else torch.empty_like(t) for t in (post, pre, weight))
    # dbias [R] and dalpha [3] in one row
    dphi, dbias_dalpha = torch.empty_like(phi), phi.new_empty(R + 3)
    MHC_BOUNDARY_BACKWARD(
        grad_streams=grad_written,
        grad_u=grads.u,
        grad_pre=grads.pre,
        grad_post=grads.post,
        grad_res=grads.res,
        grad_link=grads.link,
        x=written,
        y=y,
        post=post,
        pre=pre,
        phi=phi,
        alpha=maps.alpha,
        bias=maps.bias,
        weight=weight,
        input_eps=0.0 if norm is None else norm.eps,
        res=saved.res,
        projected=saved.projected,
        inverse_rms=saved.inverse_rms,
        dx=dx,
        dy=dy,
        dpost=dpost,
        dpre=dpre,
        dphi=dphi,
        dbias_dalpha=dbias_dalpha,
        dweight=dweight,
        partial_dphi=partial,
        partial_dbias_dalpha=phi.new_empty(len(partial), R + 3),
        partial_dweight=None if weight is None else phi.new_empty(len(partial), C),
        tokens=N,
        n=n,
        C=C,
        rows=R,
        constraint=CONSTRAINT_NUMBERS[settings.constraint],
        iterations=settings.iterations,
        transposed=settings.transposed,
        norm_eps=settings.norm_eps,
        hc_eps=settings.hc_eps,
        learns=settings.learns,
        x_is_bfloat16=written.dtype == torch.bfloat16,
        y_is_bfloat16=y is not None and y.dtype == torch.bfloat16,
    )
    # An operator returns tensors only: an empty one for an absent input.
    dy, dpost, dpre, dweight = (
        written.new_empty(0) if t is None else t for t in (dy, dpost, dpre, dweight)
    )
    # Results of an operator share no memory.
    dbias, dalpha = dbias_dalpha[:R].clone(), dbias_dalpha[R:].clone()
    return BoundaryGradients(dx, dy, dpost, dpre, dphi, dalpha, dbias, dweight)
