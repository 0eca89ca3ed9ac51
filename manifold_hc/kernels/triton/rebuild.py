"""Streams and inputs of a recompute block, from its first streams and its branches' outputs.

A program keeps some channels of all streams in registers from one write to the next, and rounds
each as memory would, so that every value has the bits it had in the forward pass.
"""

from collections.abc import Sequence
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from manifold_hc.kernels.triton import plan
from manifold_hc.kernels.triton.norm import normalised
from manifold_hc.kernels.triton.read import plus, read
from manifold_hc.kernels.triton.write import streams_of, weights_of, write, written_stream
from manifold_hc.kernels.values import InputNorm


@triton.jit
@no_type_check
def _store_read(streams, pre, u, token, live, mask, c, C: tl.constexpr):
    n: tl.constexpr = len(streams)
    # u = sum_i pre[i] x[i]
    total = tl.zeros(streams[0].shape, tl.float32)
    for i in tl.static_range(n):
        weight = tl.load(pre + token * n + i, mask=live, other=0.0)
        total = plus(total, weight[:, None], streams[i])
    tl.store(u + token[:, None] * C + c, total.to(u.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
@no_type_check
def rebuild_kernel(
    x: tl.tensor, ys: tl.tuple, posts: tl.tuple, ress: tl.tuple, pres: tl.tuple,
    streams: tl.tuple, inputs: tl.tuple, tokens: int,
    n: tl.constexpr, C: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write each sublayer's streams, read its input; with one more read than writes, x is first."""
    WRITES: tl.constexpr = len(ys)
    BEFORE: tl.constexpr = len(pres) - len(ys)
    CHUNKS: tl.constexpr = (C + BC - 1) // BC
    program = tl.program_id(0)
    token = (program // CHUNKS).to(tl.int64) * BT + tl.arange(0, BT)
    live = token < tokens
    c = program % CHUNKS * BC + tl.arange(0, BC)[None, :]
    mask = live[:, None] & (c < C)
    held = streams_of(x, token, mask, c, n, C)
    branches = ()
    for k in tl.static_range(WRITES):
        branches = branches + (tl.load(ys[k] + token[:, None] * C + c, mask=mask, other=0.0),)
    if BEFORE:
        _store_read(held, pres[0], inputs[0], token, live, mask, c, C)
    for k in tl.static_range(WRITES):
        branch = branches[k].to(tl.float32)
        made = ()
        for o in tl.static_range(n):
            # x'[o] = post[o] y + sum_i res[o, i] x[i]
            weights = weights_of(posts[k], ress[k], token, live, o, n)
            stream = written_stream(held, branch, weights).to(x.dtype.element_ty)
            tl.store(streams[k] + (token[:, None] * n + o) * C + c, stream, mask=mask)
            made = made + (stream,)
        held = made
        _store_read(held, pres[BEFORE + k], inputs[BEFORE + k], token, live, mask, c, C)


def rebuild(
    x: Tensor,
    writes: Sequence[tuple[Tensor, Tensor, Tensor]],
    reads: Sequence[Tensor],
    norms: Sequence[InputNorm | None],
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the streams after each of `writes` (y, post, res) and the input of each of `reads`."""
    step = plan.writes_at_once(x.shape[1])
    walk = _in_steps if writes and step else _one_by_one
    streams, inputs = walk(x, writes, reads)
    return streams, [
        u if norm is None else normalised(u, norm) for u, norm in zip(inputs, norms, strict=True)
    ]


def _in_steps(
    x: Tensor, writes: Sequence[tuple[Tensor, Tensor, Tensor]], reads: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Rebuild several writes in one launch, as many as compile in reasonable time."""
    step = plan.writes_at_once(x.shape[1])
    streams = [torch.empty_like(x) for _ in writes]
    inputs = [x.new_empty(len(x), x.shape[2]) for _ in reads]
    for first in range(0, len(writes), step):
        last = min(first + step, len(writes))
        read_first = first + (first > 0)
        _walk(
            streams[first - 1] if first else x,
            writes[first:last],
            reads[read_first : last + 1],
            streams[first:last],
            inputs[read_first : last + 1],
        )
    return streams, inputs


def _one_by_one(
    x: Tensor, writes: Sequence[tuple[Tensor, Tensor, Tensor]], reads: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    streams = [x]
    for y, post, res in writes:
        streams.append(write(streams[-1], y, post, res))
    return streams[1:], [read(s, pre) for s, pre in zip(streams, reads, strict=True)]


def _walk(
    x: Tensor, writes: Sequence[tuple[Tensor, Tensor, Tensor]], reads: Sequence[Tensor],
    streams: Sequence[Tensor], inputs: Sequence[Tensor],
) -> None:  # fmt: skip
    """Fill `streams` and `inputs` in one launch."""
    tokens, n, C = x.shape
    tile = plan.stream_tile(n, C, x.dtype)
    programs = plan.blocks(tokens, tile["BT"]) * plan.blocks(C, tile["BC"])
    ys, posts, ress = zip(*writes, strict=True)
    if tokens:
        with plan.launching(x):
            rebuild_kernel[(programs,)](
                x, ys, posts, ress, tuple(reads), tuple(streams), tuple(inputs), tokens,
                n=n, C=C, **tile,
            )  # fmt: skip
