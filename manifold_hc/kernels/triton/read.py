"""`u = sum_i pre[i] x[i]`, and the inner products of its backward.

Streams of one token lie in one warp, so that a sum over channels stays inside it.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from manifold_hc.kernels.triton import plan


@triton.jit
@no_type_check
def columns_of(table, token, live, count: tl.constexpr, first: tl.constexpr, stride: tl.constexpr):
    """Load a tuple of `count` vectors: entries `first`, `first + 1`, ... of every token's row."""
    found = ()
    for j in tl.static_range(count):
        found = found + (tl.load(table + token * stride + first + j, mask=live, other=0.0),)
    return found


@triton.jit
@no_type_check
def zeros_of(count: tl.constexpr, BT: tl.constexpr, L: tl.constexpr):
    """Return a tuple of `count` sums that are zero, [BT, L] each."""
    found = ()
    for _ in tl.static_range(count):
        found = found + (tl.zeros([BT, L], tl.float32),)
    return found


@triton.jit
@no_type_check
def plus(total, weight, stream):
    """Return `total + weight stream`, rounded once.

    An explicit fma: the compiler may fuse another of two products in another kernel, and u and x'
    would have other bits there.
    """
    return tl.fma(weight, stream.to(tl.float32), total)


@triton.jit
@no_type_check
def products(sums, lefts, rights):
    """Add `<lefts[k], rights[i]>` over a lane's own channels to `sums[k len(rights) + i]`."""
    COUNT: tl.constexpr = len(rights)
    added = ()
    for k in tl.static_range(len(lefts)):
        for i in tl.static_range(COUNT):
            added = added + (sums[k * COUNT + i] + tl.sum(lefts[k] * rights[i], 2),)
    return added


@triton.jit
@no_type_check
def segment_of(segment, segments: int, C: tl.constexpr, BC: tl.constexpr):
    """Return first and last channel of one of `segments` segments of near-equal length."""
    span = tl.cdiv(tl.cdiv(C, BC), segments) * BC
    return segment * span, tl.minimum(segment * span + span, C)


@triton.jit
@no_type_check
def weighted_sum(
    x, u, weights, token, live, first, last,
    n: tl.constexpr, C: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Store u for channels [first, last); weights: n vectors [BT]."""
    for start in range(first, last, BC):
        c = start + tl.arange(0, BC)[None, :]
        mask = live[:, None] & (c < C)
        total = tl.zeros([token.shape[0], BC], tl.float32)
        # u = sum_i pre[i] x[i]
        for i in tl.static_range(n):
            stream = tl.load(x + (token[:, None] * n + i) * C + c, mask=mask, other=0.0)
            total = plus(total, weights[i][:, None], stream)
        tl.store(u + token[:, None] * C + c, total.to(u.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "segments"])
@no_type_check
def read_kernel(
    x: tl.tensor, pre: tl.tensor, u: tl.tensor, tokens: int, segments: int,
    n: tl.constexpr, C: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    token = (program // segments).to(tl.int64) * BT + tl.arange(0, BT)
    live = token < tokens
    weights = columns_of(pre, token, live, n, 0, n)
    first, last = segment_of(program % segments, segments, C, BC)
    weighted_sum(x, u, weights, token, live, first, last, n, C, BC)


@triton.jit(do_not_specialize=["tokens"])
@no_type_check
def read_backward_kernel(
    grad: tl.tensor, x: tl.tensor, pre: tl.tensor, dx: tl.tensor, dpre: tl.tensor, tokens: int,
    n: tl.constexpr, C: tl.constexpr, BT: tl.constexpr, L: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    live = token < tokens
    row = token[:, None, None]
    lanes = tl.arange(0, L)[None, :, None] * V + tl.arange(0, V)[None, None, :]
    weights = columns_of(pre, token, live, n, 0, n)
    sums = zeros_of(n, BT, L)
    for start in range(0, C, L * V):
        c = start + lanes
        mask = live[:, None, None] & (c < C)
        g = tl.load(grad + row * C + c, mask=mask, other=0.0).to(tl.float32)
        streams = ()
        for i in tl.static_range(n):
            place = (row * n + i) * C + c
            streams = streams + (tl.load(x + place, mask=mask, other=0.0).to(tl.float32),)
            scaled = weights[i][:, None, None] * g  # dx[i] = pre[i] du
            tl.store(dx + place, scaled.to(dx.dtype.element_ty), mask=mask)
        sums = products(sums, (g,), streams)  # dpre[i] = <du, x[i]>
    for i in tl.static_range(n):
        tl.store(dpre + token * n + i, tl.sum(sums[i], 1), mask=live)


def read(x: Tensor, pre: Tensor) -> Tensor:
    """Return u [N, C], in x's dtype, of x [N, n, C] and pre [N, n]."""
    tokens, n, C = x.shape
    u = x.new_empty(tokens, C)
    tile = plan.stream_tile(n, C, x.dtype)
    token_blocks = plan.blocks(tokens, tile["BT"])
    segments = plan.segments(token_blocks, C, tile["BC"])
    if tokens:
        with plan.launching(x):
            read_kernel[(token_blocks * segments,)](x, pre, u, tokens, segments, n=n, C=C, **tile)
    return u


def read_backward(grad: Tensor, x: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and pre."""
    tokens, n, C = x.shape
    dx, dpre = torch.empty_like(x), torch.empty_like(pre)
    tile = plan.product_tile(n, C, x.dtype)
    if tokens:
        with plan.launching(x):
            read_backward_kernel[(plan.blocks(tokens, tile["BT"]),)](
                grad, x, pre, dx, dpre, tokens, n=n, C=C, **tile
            )
    return dx, dpre
