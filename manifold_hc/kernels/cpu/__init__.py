"""The CPU backend: C++ with vector units and threads, called through ctypes.

Streams in float32 or bfloat16, coefficients in float32, n up to 16. Sums over tokens are cut into
slices that depend on the number of tokens alone, so a result does not depend on the threads.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from manifold_hc.kernels.cpu.calls import call, size
from manifold_hc.kernels.cpu.memory import empty
from manifold_hc.kernels.operators import FUSED_CONSTRAINTS, Settings

DTYPES = (torch.float32, torch.bfloat16)

MAX_STREAMS = 16


def _is_bfloat16(tensor: Tensor) -> int:
    return int(tensor.dtype == torch.bfloat16)


def _are_bfloat16(x: Tensor, y: Tensor | None) -> tuple[int, int]:
    return _is_bfloat16(x), 0 if y is None else _is_bfloat16(y)


def _numbers(settings: Settings) -> tuple[Any, ...]:
    return (
        FUSED_CONSTRAINTS.index(settings.constraint),
        settings.iterations,
        settings.transposed,
        settings.norm_eps,
        settings.hc_eps,
    )


def sinkhorn(logits: Tensor, iterations: int, transposed: bool, hc_eps: float) -> Tensor:
    """See `Kernels.sinkhorn`."""
    N, n, _ = logits.shape
    res = torch.empty_like(logits)
    call("mhc_sinkhorn", logits, res, N, n, iterations, transposed, hc_eps)
    return res


def sinkhorn_backward(
    grad: Tensor, logits: Tensor, iterations: int, transposed: bool, hc_eps: float
) -> Tensor:
    """See `Kernels.sinkhorn_backward`."""
    N, n, _ = logits.shape
    dlogits = torch.empty_like(logits)
    call("mhc_sinkhorn_backward", grad, logits, dlogits, N, n, iterations, transposed, hc_eps)
    return dlogits


def project(v: Tensor, phi: Tensor, norm_eps: float) -> tuple[Tensor, Tensor]:
    """See `Kernels.project`."""
    (N, K), R = v.shape, phi.shape[0]
    projected, inverse_rms = phi.new_empty(N, R), phi.new_empty(N)
    call("mhc_project", v, phi, projected, inverse_rms, N, K, R, norm_eps, _is_bfloat16(v))
    return projected, inverse_rms


def project_backward(
    grad: Tensor, v: Tensor, phi: Tensor, projected: Tensor, inverse_rms: Tensor
) -> tuple[Tensor, Tensor]:
    """See `Kernels.project_backward`."""
    (N, K), R = v.shape, phi.shape[0]
    dv, dphi, parts = empty(v, N, K), torch.empty_like(phi), _slices(phi, N, 1, K)
    call(
        "mhc_project_backward",
        *(grad, v, phi, projected, inverse_rms, dv, dphi, parts, N, K, R, _is_bfloat16(v)),
    )
    return dv, dphi


def read(x: Tensor, pre: Tensor) -> Tensor:
    """See `Kernels.read`."""
    N, n, C = x.shape
    u = empty(x, N, C)
    call("mhc_read", x, pre, u, N, n, C, _is_bfloat16(x))
    return u


def read_backward(grad: Tensor, x: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
    """See `Kernels.read_backward`."""
    N, n, C = x.shape
    dx, dpre = empty(x, N, n, C), torch.empty_like(pre)
    call("mhc_read_backward", grad, x, pre, dx, dpre, N, n, C, _is_bfloat16(x))
    return dx, dpre


def write(x: Tensor, y: Tensor, post: Tensor, res: Tensor) -> Tensor:
    """See `Kernels.write`."""
    N, n, C = x.shape
    out = empty(x, N, n, C)
    call("mhc_write", x, y, post, res, out, N, n, C, _is_bfloat16(x), _is_bfloat16(y))
    return out


def write_backward(
    grad: Tensor, x: Tensor, y: Tensor, post: Tensor, res: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `Kernels.write_backward`."""
    N, n, C = x.shape
    dx, dy, dpost, dres = empty(x, N, n, C), empty(y, N, C), *map(torch.empty_like, (post, res))
    call(
        "mhc_write_backward",
        *(grad, x, y, post, res, dx, dy, dpost, dres, N, n, C, _is_bfloat16(x), _is_bfloat16(y)),
    )
    return dx, dy, dpost, dres


def branch_backward(grad: Tensor, y: Tensor, post: Tensor) -> tuple[Tensor, Tensor]:
    """See `Kernels.branch_backward`."""
    N, n, C = grad.shape
    dy, dpost = empty(y, N, C), torch.empty_like(post)
    call(
        "mhc_branch_backward",
        *(grad, y, post, dy, dpost, N, n, C, _is_bfloat16(grad), _is_bfloat16(y)),
    )
    return dy, dpost


def coefficients(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, settings: Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `Kernels.coefficients`."""
    return _cross(x, (None,) * 4, None, phi, alpha, bias, None, 0.0, settings, None)


def coefficients_and_read(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, settings: Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `Kernels.coefficients_and_read`."""
    u = empty(x, x.shape[0], x.shape[2])
    return u, *_cross(x, (None,) * 4, None, phi, alpha, bias, None, 0.0, settings, u)


def boundary(
    x: Tensor,
    y: Tensor,
    post: Tensor,
    res: Tensor,
    pre: Tensor | None,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    weight: Tensor | None,
    input_eps: float,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `Kernels.boundary`."""
    written, u = empty(x, *x.shape), empty(x, x.shape[0], x.shape[2])
    write = (x, y, post, res)
    made = _cross(written, write, pre, phi, alpha, bias, weight, input_eps, settings, u)
    return written, u, *made


def _cross(
    streams: Tensor,
    write: Sequence[Tensor | None],
    pre: Tensor | None,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    weight: Tensor | None,
    input_eps: float,
    settings: Settings,
    u: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `streams` give, which are written first where `write` (x, y, post, res) is there.

    Fills u with what is read, if it is there.
    """
    (N, n, C), R = streams.shape, phi.shape[0]
    shapes = ((N, n), (N, n), (N, n, n), (N, R), (N,))
    new_pre, new_post, new_res, projected, inverse_rms = (phi.new_empty(s) for s in shapes)
    made = (new_pre, new_post, new_res, projected, inverse_rms)
    call(
        "mhc_boundary",
        *(*write, pre, weight, input_eps, streams, phi, alpha, bias, u, *made, N, n, C, R),
        *(*_numbers(settings), *_are_bfloat16(streams, write[1])),
    )
    return made


def coefficients_and_read_backward(
    grad_u: Tensor | None,
    grad_pre: Tensor | None,
    grad_post: Tensor | None,
    grad_res: Tensor | None,
    grad_link: Tensor | None,
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    res: Tensor,
    projected: Tensor,
    inverse_rms: Tensor,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `Kernels.coefficients_and_read_backward`."""
    grads = (None, grad_u, grad_pre, grad_post, grad_res, grad_link)
    made = (res, projected, inverse_rms)
    none = (None, None, None)
    dx, _, _, _, dphi, dalpha, dbias, _ = _cross_backward(
        grads, x, none, (phi, alpha, bias), None, 0.0, made, settings
    )
    return dx, dphi, dalpha, dbias


def boundary_backward(
    grad_written: Tensor | None,
    grad_u: Tensor | None,
    grad_pre: Tensor | None,
    grad_post: Tensor | None,
    grad_res: Tensor | None,
    grad_link: Tensor | None,
    written: Tensor,
    y: Tensor,
    post: Tensor,
    pre: Tensor | None,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    weight: Tensor | None,
    input_eps: float,
    res: Tensor,
    projected: Tensor,
    inverse_rms: Tensor,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `Kernels.boundary_backward`."""
    grads = (grad_written, grad_u, grad_pre, grad_post, grad_res, grad_link)
    made = (res, projected, inverse_rms)
    return _cross_backward(
        grads, written, (y, post, pre), (phi, alpha, bias), weight, input_eps, made, settings
    )


def _cross_backward(
    grads: Sequence[Tensor | None],
    x: Tensor,
    around: tuple[Tensor | None, Tensor | None, Tensor | None],
    maps: tuple[Tensor, Tensor, Tensor],
    weight: Tensor | None,
    input_eps: float,
    made: tuple[Tensor, Tensor, Tensor],
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`around`: y and post of the write that made x, and what it is read with; empty if None."""
    (N, n, C), (phi, _, _), (y, post, pre) = x.shape, maps, around
    R, parts = phi.shape[0], _slices(phi, N, n, C)
    dx, dy = empty(x, N, n, C), None if y is None else empty(y, N, C)
    dpost, dpre, dweight = (None if t is None else torch.empty_like(t) for t in (post, pre, weight))
    dphi, small = torch.empty_like(phi), phi.new_empty(R + 3)
    small_parts = phi.new_empty(len(parts), R + 3)
    weights = None if weight is None else phi.new_empty(len(parts), C)
    call(
        "mhc_boundary_backward",
        *(*grads, x, y, post, pre, *maps, weight, input_eps, *made, dx, dy, dpost, dpre),
        *(dphi, small, dweight, parts, small_parts, weights, N, n, C, R, *_numbers(settings)),
        *(settings.learns, *_are_bfloat16(x, y)),
    )
    dy, dpost, dpre, dweight = (
        x.new_empty(0) if t is None else t for t in (dy, dpost, dpre, dweight)
    )
    return dx, dy, dpost, dpre, dphi, small[R:].clone(), small[:R].clone(), dweight


def rebuild(
    x: Tensor,
    writes: Sequence[tuple[Tensor, Tensor, Tensor]],
    reads: Sequence[Tensor],
    norms: Sequence[tuple[Tensor | None, float]],
) -> tuple[list[Tensor], list[Tensor]]:
    """See `Kernels.rebuild`."""
    N, n, C = x.shape
    streams = [empty(x, N, n, C) for _ in writes]
    inputs = [empty(x, N, C) for _ in reads]
    columns = (*zip(*writes, strict=True),) if writes else ((), (), ())
    weights = [weight for weight, _ in norms]
    kept = [_pointers(tensors) for tensors in (*columns, reads, weights)]
    epsilons = (ctypes.c_float * len(norms))(*(eps for _, eps in norms))
    made = [_pointers(tensors) for tensors in (streams, inputs)]
    y_is_bfloat16 = _is_bfloat16(writes[0][0]) if writes else 0
    sizes = (len(writes), N, n, C)
    call("mhc_rebuild", x, *kept, epsilons, *made, *sizes, _is_bfloat16(x), y_is_bfloat16)
    return streams, inputs


def _pointers(tensors: Sequence[Tensor | None]) -> Any:
    places = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
    return (ctypes.c_void_p * len(tensors))(*places)


def _slices(phi: Tensor, tokens: int, n: int, channels: int) -> Tensor:
    """Room for the gradients of phi that are summed apart."""
    count = size("mhc_slices", tokens)
    return empty(phi, count, size("mhc_slice_floats", n, channels, phi.shape[0]))
