"""Bytes: what a connection must move (arXiv 2512.24880, section 4.3), what the machine can."""

import time
from statistics import median

import torch
from torch import Tensor

from manifold_hc.bench.problem import Problem

COPY_BYTES = 256 * 2**20
"""Size of the tensor that is copied; larger than any cache."""


def forward_elements(n: int) -> int:
    """Elements a token and channel that a forward pass reads and writes: 4n + 2.

    Coefficients read x (n); read reads x and writes u (n + 1); write reads x and y and writes x'
    (2n + 1).
    """
    return 4 * n + 2


def backward_elements(n: int) -> int:
    """Elements a token and channel that a backward pass reads and writes: 5n + 3.

    The write's gradients read x, y and the gradient of x' and make y's (2n + 2); the rest reads
    x, the gradients of x' and of u and makes x's (3n + 1).
    """
    return 5 * n + 3


def bound_bytes(problem: Problem) -> tuple[int, int]:
    """Bytes that forward and backward of one connection move, coefficients left out."""
    each = problem.tokens * problem.channels * problem.torch_dtype.itemsize
    return forward_elements(problem.streams) * each, backward_elements(problem.streams) * each


def copy_bandwidth(device: str, size: int = COPY_BYTES, repeats: int = 10) -> float:
    """Bytes a second, read and written, of a large copy into memory that is in use already."""
    source = torch.ones(size // 4, device=device)
    target = torch.zeros_like(source)
    target.copy_(source)
    return 2 * size / median(_copy_seconds(source, target) for _ in range(repeats))


def _copy_seconds(source: Tensor, target: Tensor) -> float:
    if source.is_cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    began = time.perf_counter()
    target.copy_(source)
    return time.perf_counter() - began
