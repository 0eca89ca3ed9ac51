"""`x'[o] = sum_i res[o, i] x[i] + post[o] y` and its derivatives on the CPU: source/streams.cpp."""

import torch
from torch import Tensor

from manifold_hc.kernels.cpu.functions import INT64, POINTER, kernel
from manifold_hc.kernels.cpu.memory import empty

MHC_WRITE = kernel(
    "mhc_write",
    x=POINTER,
    y=POINTER,
    post=POINTER,
    res=POINTER,
    out=POINTER,
    tokens=INT64,
    n=INT64,
    C=INT64,
    x_is_bfloat16=INT64,
    y_is_bfloat16=INT64,
)

MHC_WRITE_BACKWARD = kernel(
    "mhc_write_backward",
    grad=POINTER,
    x=POINTER,
    y=POINTER,
    post=POINTER,
    res=POINTER,
    dx=POINTER,
    dy=POINTER,
    dpost=POINTER,
    dres=POINTER,
    tokens=INT64,
    n=INT64,
    C=INT64,
    x_is_bfloat16=INT64,
    y_is_bfloat16=INT64,
)

MHC_BRANCH_BACKWARD = kernel(
    "mhc_branch_backward",
    grad=POINTER,
    y=POINTER,
    post=POINTER,
    dy=POINTER,
    dpost=POINTER,
    tokens=INT64,
    n=INT64,
    C=INT64,
    x_is_bfloat16=INT64,
    y_is_bfloat16=INT64,
)


def write(x: Tensor, y: Tensor, post: Tensor, res: Tensor) -> Tensor:
    """Return x' [N, n, C], in x's dtype, of x, y [N, C], post [N, n] and res [N, o, i]."""
    N, n, C = x.shape
    # Each token's streams are read once and written once.
    out = empty(x, N, n, C)
    MHC_WRITE(
        x=x,
        y=y,
        post=post,
        res=res,
        out=out,
        tokens=N,
        n=n,
        C=C,
        x_is_bfloat16=x.dtype == torch.bfloat16,
        y_is_bfloat16=y.dtype == torch.bfloat16,
    )
    return out


def write_backward(
    grad: Tensor, x: Tensor, y: Tensor, post: Tensor, res: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, y, post and res."""
    N, n, C = x.shape
    # dx[i] = sum_o res[o, i] g[o], dy = sum_o post[o] g[o]
    dx, dy = empty(x, N, n, C), empty(y, N, C)
    # dpost[o] = <g[o], y>, dres[o, i] = <g[o], x[i]>
    dpost, dres = torch.empty_like(post), torch.empty_like(res)
    MHC_WRITE_BACKWARD(
        grad=grad,
        x=x,
        y=y,
        post=post,
        res=res,
        dx=dx,
        dy=dy,
        dpost=dpost,
        dres=dres,
        tokens=N,
        n=n,
        C=C,
        x_is_bfloat16=x.dtype == torch.bfloat16,
        y_is_bfloat16=y.dtype == torch.bfloat16,
    )
    return dx, dy, dpost, dres


def branch_backward(grad: Tensor, y: Tensor, post: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of a write's y and post alone."""
    N, n, C = grad.shape
    # dy = sum_o post[o] g[o], dpost[o] = <g[o], y>
    dy, dpost = empty(y, N, C), torch.empty_like(post)
    MHC_BRANCH_BACKWARD(
        grad=grad,
        y=y,
        post=post,
        dy=dy,
        dpost=dpost,
        tokens=N,
        n=n,
        C=C,
        x_is_bfloat16=grad.dtype == torch.bfloat16,
        y_is_bfloat16=y.dtype == torch.bfloat16,
    )
    return dy, dpost
