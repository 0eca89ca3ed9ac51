"""The CPU backend: C++ with vector units and threads, called through ctypes.

Streams in float32 or bfloat16, coefficients in float32, n up to 16. Sums over tokens are cut into
slices that depend on the number of tokens alone, so a result does not depend on the threads.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from manifold_hc.kernels.cpu.build import library
from manifold_hc.kernels.cpu.memory import empty
from manifold_hc.kernels.operators import FUSED_CONSTRAINTS, Settings

DTYPES = (torch.float32, torch.bfloat16)

MAX_STREAMS = 16


def _call(function: str, *arguments: Any) -> None:
    """Tensors go as pointers, None as null, then numbers by their type; threads come last."""
    run = getattr(library(), function)
    if run.argtypes is None:
        run.argtypes = [*map(_kind, arguments), ctypes.c_int]
    pointers = (a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)
    run(*pointers, torch.get_num_threads())


def _kind(argument: Any) -> Any:
    if argument is None or isinstance(argument, Tensor):
        return ctypes.c_void_p
    return ctypes.c_float if isinstance(argument, float) else ctypes.c_int64


def _is_bfloat16(tensor: Tensor) -> int:
    return int(tensor.dtype == torch.bfloat16)


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
    _call("mhc_sinkhorn", logits, res, N, n, iterations, transposed, hc_eps)
    return res


def sinkhorn_backward(
    grad: Tensor, logits: Tensor, iterations: int, transposed: bool, hc_eps: float
) -> Tensor:
    """See `Kernels.sinkhorn_backward`."""
    N, n, _ = logits.shape
    dlogits = torch.empty_like(logits)
    _call("mhc_sinkhorn_backward", grad, logits, dlogits, N, n, iterations, transposed, hc_eps)
    return dlogits


def project(v: Tensor, phi: Tensor, norm_eps: float) -> tuple[Tensor, Tensor]:
    """See `Kernels.project`."""
    (N, K), R = v.shape, phi.shape[0]
    projected, inverse_rms = phi.new_empty(N, R), phi.new_empty(N)
    _call("mhc_project", v, phi, projected, inverse_rms, N, K, R, norm_eps, _is_bfloat16(v))
    return projected, inverse_rms


def project_backward(
    grad: Tensor, v: Tensor, phi: Tensor, projected: Tensor, inverse_rms: Tensor
) -> tuple[Tensor, Tensor]:
    """See `Kernels.project_backward`."""
    (N, K), R = v.shape, phi.shape[0]
    dv, dphi, parts = empty(v, N, K), torch.empty_like(phi), _slices(phi, N, 1, K)
    _call(
        "mhc_project_backward",
        *(grad, v, phi, projected, inverse_rms, dv, dphi, parts, N, K, R, _is_bfloat16(v)),
    )
    return dv, dphi


def read(x: Tensor, pre: Tensor) -> Tensor:
    """See `Kernels.read`."""
    N, n, C = x.shape
    u = empty(x, N, C)
    _call("mhc_read", x, pre, u, N, n, C, _is_bfloat16(x))
    return u


def read_backward(grad: Tensor, x: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
    """See `Kernels.read_backward`."""
    N, n, C = x.shape
    dx, dpre = empty(x, N, n, C), torch.empty_like(pre)
    _call("mhc_read_backward", grad, x, pre, dx, dpre, N, n, C, _is_bfloat16(x))
    return dx, dpre


def write(x: Tensor, y: Tensor, post: Tensor, res: Tensor) -> Tensor:
    """See `Kernels.write`."""
    N, n, C = x.shape
    out = empty(x, N, n, C)
    _call("mhc_write", x, y, post, res, out, N, n, C, _is_bfloat16(x), _is_bfloat16(y))
    return out


def write_backward(
    grad: Tensor, x: Tensor, y: Tensor, post: Tensor, res: Tensor, wants_x: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `Kernels.write_backward`."""
    N, n, C = x.shape
    dx = empty(x, N, n, C) if wants_x else None
    dy, dpost, dres = empty(y, N, C), torch.empty_like(post), torch.empty_like(res)
    _call(
        "mhc_write_backward",
        *(grad, x, y, post, res, dx, dy, dpost, dres, N, n, C, _is_bfloat16(x), _is_bfloat16(y)),
    )
    return x.new_empty(0) if dx is None else dx, dy, dpost, dres


def coefficients_and_read(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, settings: Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `Kernels.coefficients_and_read`."""
    (N, n, C), R = x.shape, phi.shape[0]
    shapes = ((N, n), (N, n), (N, n, n), (N, R), (N,))
    u, made = empty(x, N, C), tuple(phi.new_empty(shape) for shape in shapes)
    _call(
        "mhc_coefficients_and_read",
        *(x, phi, alpha, bias, u, *made, N, n, C, R, *_numbers(settings), _is_bfloat16(x)),
    )
    pre, post, res, projected, inverse_rms = made
    return u, pre, post, res, projected, inverse_rms


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
    (N, n, C), R = x.shape, phi.shape[0]
    dx, dphi, small = empty(x, N, n, C), torch.empty_like(phi), phi.new_empty(R + 3)
    parts = _slices(phi, N, n, C)
    small_parts = phi.new_empty(len(parts), R + 3)
    _call(
        "mhc_coefficients_and_read_backward",
        *(grad_u, grad_pre, grad_post, grad_res, grad_link),
        *(x, phi, alpha, bias, res, projected, inverse_rms, dx, dphi, small, parts, small_parts),
        *(N, n, C, R, *_numbers(settings), _is_bfloat16(x)),
    )
    return dx, dphi, small[R:].clone(), small[:R].clone()


def _slices(phi: Tensor, tokens: int, n: int, channels: int) -> Tensor:
    """Room for the gradients of phi that are summed apart."""
    count = library().mhc_slices(ctypes.c_int64(tokens))
    sizes = (ctypes.c_int64(size) for size in (n, channels, phi.shape[0]))
    return empty(phi, count, library().mhc_slice_floats(*sizes))
