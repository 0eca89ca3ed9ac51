"""Sinkhorn-Knopp and its derivative on the CPU: source/sinkhorn.cpp."""

import torch
from torch import Tensor

from manifold_hc.kernels.cpu.functions import FLOAT, INT64, POINTER, kernel

MHC_SINKHORN = kernel(
    "mhc_sinkhorn",
    logits=POINTER,
    res=POINTER,
    tokens=INT64,
    n=INT64,
    iterations=INT64,
    transposed=INT64,
    eps=FLOAT,
)

MHC_SINKHORN_BACKWARD = kernel(
    "mhc_sinkhorn_backward",
    grad=POINTER,
    logits=POINTER,
    dlogits=POINTER,
    tokens=INT64,
    n=INT64,
    iterations=INT64,
    transposed=INT64,
    eps=FLOAT,
)


def sinkhorn(logits: Tensor, iterations: int, transposed: bool, hc_eps: float) -> Tensor:
    """Return res [N, o, i] of logits [N, n, n]."""
    N, n, _ = logits.shape
    res = torch.empty_like(logits)
    MHC_SINKHORN(
        logits=logits,
        res=res,
        tokens=N,
        n=n,
        iterations=iterations,
        transposed=transposed,
        eps=hc_eps,
    )
    return res


def sinkhorn_backward(
    grad: Tensor, logits: Tensor, iterations: int, transposed: bool, hc_eps: float
) -> Tensor:
    """Return the gradient of logits [N, n, n], the iterates recomputed."""
    N, n, _ = logits.shape
    # M_1, M_2, ... again, then G <- G - M sum(G) from the last to the first
    dlogits = torch.empty_like(logits)
    MHC_SINKHORN_BACKWARD(
        grad=grad,
        logits=logits,
        dlogits=dlogits,
        tokens=N,
        n=n,
        iterations=iterations,
        transposed=transposed,
        eps=hc_eps,
    )
    return dlogits
