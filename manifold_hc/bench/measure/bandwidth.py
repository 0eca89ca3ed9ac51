"""Bytes that a connection must move (arXiv 2512.24880, section 4.3), and the copy bandwidth."""

from statistics import median

import torch

from manifold_hc.bench.measure.timing import call_seconds
from manifold_hc.bench.problem import Problem

COPY_BYTES = 256 * 2**20
"""Size of the copied tensor; larger than any cache."""


def bound_elements(n: int) -> tuple[int, int]:
    """Return the elements per token and channel that forward and backward must read and write.

    Forward, 4n + 2: the coefficients read x (n); read reads x and writes u (n + 1); write reads x
    and y and writes x' (2n + 1). Backward, 5n + 3: the write's gradients read x, y and the gradient
    of x' and write y's (2n + 2); the rest reads x, the gradients of x' and of u and writes x's
    (3n + 1).
    """
    return 4 * n + 2, 5 * n + 3


def bound_bytes(problem: Problem) -> tuple[int, int]:
    """Return the bytes that forward and backward of one connection move, without coefficients."""
    forward, backward = bound_elements(problem.streams)
    stream = problem.stream_bytes // problem.streams
    return forward * stream, backward * stream


def copy_bandwidth(device: str, size: int = COPY_BYTES, repeats: int = 10) -> float:
    """Measure a large copy into memory that is already mapped: bytes per second, read and written.

    The median of several copies.
    """
    source = torch.ones(size // 4, device=device)
    target = torch.zeros_like(source)
    target.copy_(source)
    seconds = [call_seconds(source.device, lambda: target.copy_(source))[0] for _ in range(repeats)]
    return 2 * size / median(seconds)
