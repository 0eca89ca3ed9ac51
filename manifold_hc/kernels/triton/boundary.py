"""Boundary between two sublayers: write, coefficients of the written streams, read.

The first launch writes, and sums projections and squares of the written streams while they are in
registers; with known read weights it reads too, and no launch reads the streams again. The second
is that of `coefficients`. A norm of u is a third.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from manifold_hc.kernels.triton import plan
from manifold_hc.kernels.triton.coefficients import empty_maps, finish
from manifold_hc.kernels.triton.norm import normalised
from manifold_hc.kernels.triton.read import plus
from manifold_hc.kernels.triton.write import streams_of, weights_of, written_stream
from manifold_hc.kernels.values import ComputedMaps, InputNorm, MapParameters, Settings, WriteInputs

KEPT = tl.constexpr(4)
"""Largest n whose matrix of a token stays in registers, at half the cost of its addresses.

Beyond, a loop over the output streams loads a row of it at a time.
"""


@triton.jit
@no_type_check
def _write_and_project(
    streams, branch, kept, post, res, pre, phi, written, products, squares, total,
    token, live, mask, start, r, o, C: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store stream o of x', BC channels from `start`; add its products, squares and share of u."""
    n: tl.constexpr = len(streams)
    BC: tl.constexpr = branch.shape[1]
    weights = kept[o] if len(kept) > 0 else weights_of(post, res, token, live, o, n)
    made = written_stream(streams, branch, weights).to(written.dtype.element_ty)
    c = start + tl.arange(0, BC)[None, :]
    tl.store(written + (token[:, None] * n + o) * C + c, made, mask=mask)
    stream = made.to(tl.float32)
    if pre is not None:
        weight = tl.load(pre + token * n + o, mask=live, other=0.0)
        total = plus(total, weight[:, None], stream)  # u += pre[o] x'[o]
    k = start + tl.arange(0, BC)[:, None]
    inside = (k < C) & (r < R)[None, :]
    rows = tl.load(phi + r[None, :] * (n * C) + o * C + k, mask=inside, other=0.0)
    # The compiler repeats elementwise work right before a product in the layout of its operand, and
    # keeps all inputs in registers twice. A sum in between stops that.
    operand = tl.sum(tl.join(stream, tl.zeros_like(stream)), 2)
    # x'[o] phi^T and, below, sum x'[o]^2
    products = tl.dot(operand, rows, products, input_precision=PRECISION)
    return products, plus(squares, stream, stream), total


@triton.jit(do_not_specialize=["tokens"])
@no_type_check
def boundary_kernel(
    x: tl.tensor, y: tl.tensor, post: tl.tensor, res: tl.tensor, pre: tl.tensor, phi: tl.tensor,
    written: tl.tensor, u: tl.tensor, partial: tl.tensor, squares: tl.tensor, tokens: int,
    n: tl.constexpr, C: tl.constexpr, R: tl.constexpr, CHUNK: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, RB: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write and project CHUNK channels of one token block: `project_part` of x'.

    Where phi has more rows than fit, several programs make the same x', and one stores it.
    """
    split = tl.program_id(1)
    row_block = tl.program_id(2)
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    live = token < tokens
    r = row_block * RB + tl.arange(0, RB)
    products = tl.zeros([BT, RB], tl.float32)
    norms = tl.zeros([BT, BC], tl.float32)
    kept = ()
    if n <= KEPT:
        for o in tl.static_range(n):
            kept = kept + (weights_of(post, res, token, live, o, n),)
    for start in range(split * CHUNK, tl.minimum(split * CHUNK + CHUNK, C), BC):
        c = start + tl.arange(0, BC)[None, :]
        mask = live[:, None] & (c < C)
        branch = tl.load(y + token[:, None] * C + c, mask=mask, other=0.0).to(tl.float32)
        streams = streams_of(x, token, mask, c, n, C)
        total = tl.zeros([BT, BC], tl.float32)
        mask = tl.where(row_block == 0, mask, False)
        if n <= KEPT:
            for o in tl.static_range(n):
                products, norms, total = _write_and_project(
                    streams, branch, kept, post, res, pre, phi, written, products, norms, total,
                    token, live, mask, start, r, o, C, R, PRECISION,
                )  # fmt: skip
        else:
            for o in range(n):
                products, norms, total = _write_and_project(
                    streams, branch, kept, post, res, pre, phi, written, products, norms, total,
                    token, live, mask, start, r, o, C, R, PRECISION,
                )  # fmt: skip
        if pre is not None:
            tl.store(u + token[:, None] * C + c, total.to(u.dtype.element_ty), mask=mask)
    first = split.to(tl.int64) * tokens
    mask = live[:, None] & (r < R)[None, :]
    tl.store(partial + (first + token[:, None]) * R + r[None, :], products, mask=mask)
    tl.store(squares + first + token, tl.sum(norms, 1), mask=tl.where(row_block == 0, live, False))


def boundary(
    write: WriteInputs,
    pre: Tensor | None,
    maps: MapParameters,
    norm: InputNorm | None,
    settings: Settings,
) -> tuple[Tensor, Tensor, ComputedMaps]:
    """Return the written streams [N, n, C], u [N, C] and the maps of the written streams.

    pre: read weights [N, n]; None to read with the new ones.
    """
    x, y, post, res = write
    phi = maps.phi
    tokens, n, C = x.shape
    R = phi.shape[0]
    written, u = torch.empty_like(x), x.new_empty(tokens, C)
    made = empty_maps(x, phi)
    if not tokens:
        return written, u, made
    tile = plan.boundary_tile(n, C, R, x.dtype)
    splits = plan.blocks(C, tile["CHUNK"])
    partial, squares = phi.new_empty(splits, tokens, R), phi.new_empty(splits, tokens)
    with plan.launching(x):
        boundary_kernel[(plan.blocks(tokens, tile["BT"]), splits, plan.blocks(R, tile["RB"]))](
            x, y, post, res, pre, phi, written, u, partial, squares, tokens,
            n=n, C=C, R=R, PRECISION=plan.precision(x.dtype), **tile,
        )  # fmt: skip
        finish(written, partial, squares, maps, u if pre is None else None, made, settings)
        if norm is not None:
            u = normalised(u, norm)
    return written, u, made
