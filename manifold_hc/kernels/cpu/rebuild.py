"""Streams and inputs of a recompute block, rebuilt on the CPU: source/streams.cpp."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from manifold_hc.kernels.cpu.functions import INT64, POINTER, kernel
from manifold_hc.kernels.cpu.memory import empty
from manifold_hc.kernels.values import InputNorm

MHC_REBUILD = kernel(
    "mhc_rebuild",
    x=POINTER,
    y=POINTER,
    post=POINTER,
    res=POINTER,
    pre=POINTER,
    weight=POINTER,
    eps=POINTER,
    outs=POINTER,
    inputs=POINTER,
    writes=INT64,
    tokens=INT64,
    n=INT64,
    C=INT64,
    x_is_bfloat16=INT64,
    y_is_bfloat16=INT64,
)


def rebuild(
    x: Tensor,
    writes: Sequence[tuple[Tensor, Tensor, Tensor]],
    reads: Sequence[Tensor],
    norms: Sequence[InputNorm | None],
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the streams after each of `writes` (y, post, res) and the input of each of `reads`."""
    N, n, C = x.shape
    streams = [empty(x, N, n, C) for _ in writes]
    inputs = [empty(x, N, C) for _ in reads]
    # Arrays of pointers: the C function takes one pointer a write and a read.
    epsilons = [0.0 if norm is None else norm.eps for norm in norms]
    MHC_REBUILD(
        x=x,
        y=_pointers([y for y, _, _ in writes]),
        post=_pointers([post for _, post, _ in writes]),
        res=_pointers([res for _, _, res in writes]),
        pre=_pointers(reads),
        weight=_pointers([None if norm is None else norm.weight for norm in norms]),
        eps=(ctypes.c_float * len(norms))(*epsilons),
        outs=_pointers(streams),
        inputs=_pointers(inputs),
        writes=len(writes),
        tokens=N,
        n=n,
        C=C,
        x_is_bfloat16=x.dtype == torch.bfloat16,
        y_is_bfloat16=any(y.dtype == torch.bfloat16 for y, _, _ in writes),
    )
    return streams, inputs


def _pointers(tensors: Sequence[Tensor | None]) -> Any:
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    return (ctypes.c_void_p * len(tensors))(*addresses)
