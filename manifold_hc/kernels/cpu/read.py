"""`u = sum_i pre[i] x[i]` and its derivative on the CPU: source/streams.cpp."""

import torch
from torch import Tensor

from manifold_hc.kernels.cpu.functions import INT64, POINTER, kernel
from manifold_hc.kernels.cpu.memory import empty

MHC_READ = kernel(
    "mhc_read",
    x=POINTER,
    pre=POINTER,
    u=POINTER,
    tokens=INT64,
    n=INT64,
    C=INT64,
    is_bfloat16=INT64,
)

MHC_READ_BACKWARD = kernel(
    "mhc_read_backward",
    grad=POINTER,
    x=POINTER,
    pre=POINTER,
    dx=POINTER,
    dpre=POINTER,
    tokens=INT64,
    n=INT64,
    C=INT64,
    is_bfloat16=INT64,
)


def read(x: Tensor, pre: Tensor) -> Tensor:
    """Return u [N, C], in x's dtype, of x [N, n, C] and pre [N, n]."""
    N, n, C = x.shape
    u = empty(x, N, C)
    MHC_READ(x=x, pre=pre, u=u, tokens=N, n=n, C=C, is_bfloat16=x.dtype == torch.bfloat16)
    return u


def read_backward(grad: Tensor, x: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and pre."""
    N, n, C = x.shape
    # dx[i] = pre[i] du, dpre[i] = <du, x[i]>
    dx, dpre = empty(x, N, n, C), torch.empty_like(pre)
    MHC_READ_BACKWARD(
        grad=grad,
        x=x,
        pre=pre,
        dx=dx,
        dpre=dpre,
        tokens=N,
        n=n,
        C=C,
        is_bfloat16=x.dtype == torch.bfloat16,
    )
    return dx, dpre
