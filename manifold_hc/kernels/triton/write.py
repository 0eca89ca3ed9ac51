"""`x'[o] = sum_i res[o, i] x[i] + post[o] y`, and every gradient of it in one read."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from manifold_hc.kernels.triton import plan
from manifold_hc.kernels.triton.read import columns_of, plus, products, segment_of, zeros_of

UNROLLED = tl.constexpr(8)
"""Largest n whose loops over output streams are unrolled; beyond it, compiling takes too long."""


@triton.jit
@no_type_check
def weights_of(post, res, token, live, o, n: tl.constexpr):
    """Load the weights of stream o of x': n + 1 vectors, post[o] and then res[o, i]."""
    found = (tl.load(post + token * n + o, mask=live, other=0.0),)
    for i in tl.static_range(n):
        found = found + (tl.load(res + token * (n * n) + o * n + i, mask=live, other=0.0),)
    return found


@triton.jit
@no_type_check
def written_stream(streams, branch, weights):
    """Return stream o of x' [BT, BC] in float32; weights: its `weights_of`."""
    total = weights[0][:, None] * branch  # post[o] y
    # sum_i res[o, i] x[i]
    for i in tl.static_range(len(streams)):
        total = plus(total, weights[1 + i][:, None], streams[i])
    return total


@triton.jit
@no_type_check
def streams_of(x, token, mask, c, n: tl.constexpr, C: tl.constexpr):
    """Load a tuple of the n streams at the channels c [1, BC], in their own dtype."""
    found = ()
    for i in tl.static_range(n):
        place = x + (token[:, None] * n + i) * C + c
        found = found + (tl.load(place, mask=mask, other=0.0),)
    return found


@triton.jit
@no_type_check
def _store_written(
    streams, branch, post, res, out, token, live, mask, c, o, C: tl.constexpr
):  # fmt: skip
    """Store stream o of x' at the channels c."""
    n: tl.constexpr = len(streams)
    total = written_stream(streams, branch, weights_of(post, res, token, live, o, n))
    place = out + (token[:, None] * n + o) * C + c
    tl.store(place, total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "segments"])
@no_type_check
def write_kernel(
    x: tl.tensor, y: tl.tensor, post: tl.tensor, res: tl.tensor, out: tl.tensor,
    tokens: int, segments: int,
    n: tl.constexpr, C: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    token = (program // segments).to(tl.int64) * BT + tl.arange(0, BT)
    live = token < tokens
    first, last = segment_of(program % segments, segments, C, BC)
    row = token[:, None]
    for start in range(first, last, BC):
        c = start + tl.arange(0, BC)[None, :]
        mask = live[:, None] & (c < C)
        branch = tl.load(y + row * C + c, mask=mask, other=0.0).to(tl.float32)
        streams = streams_of(x, token, mask, c, n, C)
        if n <= UNROLLED:
            for o in tl.static_range(n):
                _store_written(streams, branch, post, res, out, token, live, mask, c, o, C)
        else:
            for o in range(n):
                _store_written(streams, branch, post, res, out, token, live, mask, c, o, C)


@triton.jit
@no_type_check
def _store_mixed_back(grads, res, dx, token, live, mask, c, i, C: tl.constexpr):
    """Store stream i of `res^T grads`, dx[i] = sum_o res[o, i] g[o], at the channels c."""
    n: tl.constexpr = len(grads)
    total = tl.zeros(grads[0].shape, tl.float32)
    for o in tl.static_range(n):
        weight = tl.load(res + token * (n * n) + o * n + i, mask=live, other=0.0)
        total += weight[:, None, None] * grads[o]
    place = dx + (token[:, None, None] * n + i) * C + c
    tl.store(place, total.to(dx.dtype.element_ty), mask=mask)


@triton.jit
@no_type_check
def _pass_over_channels(
    grad, x, y, post, res, dx, dy, dpost, dres, token, live, first,
    n: tl.constexpr, C: tl.constexpr, L: tl.constexpr, V: tl.constexpr,
    ROWS: tl.constexpr, STORES: tl.constexpr,
):  # fmt: skip
    """Store dpost and, if x is given, dres of ROWS output streams from `first` on.

    With STORES, which needs first == 0, also dy and, if x is given, dx.
    """
    BT: tl.constexpr = token.shape[0]
    COUNT: tl.constexpr = n if STORES else ROWS
    RIGHTS: tl.constexpr = 1 if x is None else n + 1
    row = token[:, None, None]
    lanes = tl.arange(0, L)[None, :, None] * V + tl.arange(0, V)[None, None, :]
    sums = zeros_of(ROWS * RIGHTS, BT, L)
    if STORES:
        gates = columns_of(post, token, live, n, 0, n)
    for start in range(0, C, L * V):
        c = start + lanes
        mask = live[:, None, None] & (c < C)
        grads = ()
        for o in tl.static_range(COUNT):
            place = grad + (row * n + first + o) * C + c
            grads = grads + (tl.load(place, mask=mask, other=0.0).to(tl.float32),)
        rights = (tl.load(y + row * C + c, mask=mask, other=0.0).to(tl.float32),)
        if x is not None:
            for i in tl.static_range(n):
                place = x + (row * n + i) * C + c
                rights = rights + (tl.load(place, mask=mask, other=0.0).to(tl.float32),)
        sums = products(sums, grads[:ROWS], rights)  # <g[o], y> and <g[o], x[i]>
        if STORES:
            # dy = sum_o post[o] g[o]
            total = tl.zeros([BT, L, V], tl.float32)
            for o in tl.static_range(n):
                total += gates[o][:, None, None] * grads[o]
            tl.store(dy + row * C + c, total.to(dy.dtype.element_ty), mask=mask)
            if x is not None:
                if n <= UNROLLED:
                    for i in tl.static_range(n):
                        _store_mixed_back(grads, res, dx, token, live, mask, c, i, C)
                else:
                    for i in range(n):
                        _store_mixed_back(grads, res, dx, token, live, mask, c, i, C)
    for k in tl.static_range(ROWS):
        o = first + k
        # dpost[o] = <g[o], y>
        tl.store(dpost + token * n + o, tl.sum(sums[k * RIGHTS], 1), mask=live)
        for i in tl.static_range(RIGHTS - 1):
            product = tl.sum(sums[k * RIGHTS + 1 + i], 1)  # dres[o, i] = <g[o], x[i]>
            tl.store(dres + token * (n * n) + o * n + i, product, mask=live)


@triton.jit(do_not_specialize=["tokens"])
@no_type_check
def write_backward_kernel(
    grad: tl.tensor, x: tl.tensor, y: tl.tensor, post: tl.tensor, res: tl.tensor,
    dx: tl.tensor, dy: tl.tensor, dpost: tl.tensor, dres: tl.tensor, tokens: int,
    n: tl.constexpr, C: tl.constexpr, BT: tl.constexpr, L: tl.constexpr, V: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Make all gradients of a write; without x, dy and dpost alone.

    One pass over the channels where all inner products fit in registers (ROWS = n), else one for
    each ROWS output streams.
    """
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    live = token < tokens
    _pass_over_channels(
        grad, x, y, post, res, dx, dy, dpost, dres, token, live, 0, n, C, L, V, ROWS, True
    )
    for first in range(ROWS, n, ROWS):
        _pass_over_channels(
            grad, x, y, post, res, dx, dy, dpost, dres, token, live, first, n, C, L, V, ROWS, False
        )


def write(x: Tensor, y: Tensor, post: Tensor, res: Tensor) -> Tensor:
    """Return x' [N, n, C], in x's dtype, of x, y [N, C], post [N, n] and res [N, o, i]."""
    tokens, n, C = x.shape
    out = torch.empty_like(x)
    tile = plan.stream_tile(n, C, x.dtype)
    token_blocks = plan.blocks(tokens, tile["BT"])
    segments = plan.segments(token_blocks, C, tile["BC"])
    if tokens:
        with plan.launching(x):
            write_kernel[(token_blocks * segments,)](
                x, y, post, res, out, tokens, segments, n=n, C=C, **tile
            )
    return out


def write_backward(
    grad: Tensor, x: Tensor, y: Tensor, post: Tensor, res: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, y, post and res."""
    dx, dy, dpost, dres = map(torch.empty_like, (x, y, post, res))
    _launch_backward(grad, x, y, post, res, dx, dy, dpost, dres)
    return dx, dy, dpost, dres


def branch_backward(grad: Tensor, y: Tensor, post: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of a write's y and post alone."""
    dy, dpost = torch.empty_like(y), torch.empty_like(post)
    _launch_backward(grad, None, y, post, None, None, dy, dpost, None)
    return dy, dpost


def _launch_backward(grad: Tensor, x: Tensor | None, *rest: Tensor | None) -> None:
    tokens, n, C = grad.shape
    tile = plan.product_tile(n, C, grad.dtype)
    rows = n if x is None else plan.product_rows(n)
    if tokens:
        with plan.launching(grad):
            write_backward_kernel[(plan.blocks(tokens, tile["BT"]),)](
                grad, x, *rest, tokens, n=n, C=C, ROWS=rows, **tile
            )
