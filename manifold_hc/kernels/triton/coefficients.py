"""Coefficients and read: two launches over the streams, or one where a block stays in cache.

The first launch projects (`project`). The second turns projections into gates, matrices and u:
some of its programs run Sinkhorn while the others, which need only the gates, move the streams.
"""

from typing import Any, no_type_check

import triton
import triton.language as tl
from torch import Tensor

from manifold_hc.kernels.triton import plan
from manifold_hc.kernels.triton.project import (
    inverse_root_mean_square,
    partial_projections,
    project_part,
    reduced,
)
from manifold_hc.kernels.triton.read import segment_of, weighted_sum
from manifold_hc.kernels.triton.sinkhorn import (
    epsilon,
    matrix_offsets,
    project_onto_doubly_stochastic,
    role,
)
from manifold_hc.kernels.values import ComputedMaps, MapParameters, Settings


@triton.jit
@no_type_check
def gates_and_read(
    x, partial, squares, alpha, bias, u, pre, post, projected, inverse_rms,
    block, segment, segments: int, tokens: int, splits: int, norm_eps: float, hc_eps: float,
    n: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Store u of one token block over one segment, unless u is None.

    Segment 0 also stores pre, post, their projections p and 1 / rms.
    """
    token = block.to(tl.int64) * BT + tl.arange(0, BT)
    live = token < tokens
    inverse = inverse_root_mean_square(x, squares, token, live, tokens, splits, norm_eps, n * C)
    j = tl.arange(0, 2 * P)[None, :]
    mask = live[:, None] & (j < 2 * n)
    offsets = token[:, None] * R + j
    total = reduced(partial, offsets, mask, splits, tokens.to(tl.int64) * R)
    p = total * inverse[:, None]  # p = v phi^T / rms(v)
    is_post = j >= n
    # pre = sigmoid(alpha p + bias) + hc_eps, post = 2 sigmoid(alpha p + bias)
    logits = p * tl.load(alpha + is_post.to(tl.int32)) + tl.load(
        bias + j, mask=j < 2 * n, other=0.0
    )
    gates = tl.sigmoid(logits)
    gates = tl.where(is_post, 2 * gates, gates + hc_eps)
    writes = tl.where(segment == 0, mask, False)
    tl.store(projected + offsets, p, mask=writes)
    tl.store(pre + token[:, None] * n + j, gates, mask=writes & (j < n))
    tl.store(post + token[:, None] * n + j - n, gates, mask=writes & is_post)
    tl.store(inverse_rms + token, inverse, mask=tl.where(segment == 0, live, False))
    if u is not None:
        weights = ()
        for i in tl.static_range(n):
            weights = weights + (tl.sum(tl.where(j == i, gates, 0.0), 1),)
        first, last = segment_of(segment, segments, C, BC)
        weighted_sum(x, u, weights, token, live, first, last, n, C, BC)


@triton.jit
@no_type_check
def mixing(
    x, partial, squares, alpha, bias, res, projected,
    block, tokens: int, splits: int, iterations: int, norm_eps: float, log2_eps: float,
    n: tl.constexpr, C: tl.constexpr, R: tl.constexpr, BT: tl.constexpr, P: tl.constexpr,
    CONSTRAINT: tl.constexpr, TRANSPOSED: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Store res of one token block, and the projections it comes from."""
    a = tl.arange(0, P)[:, None]
    b = tl.arange(0, P)[None, :]
    if CONSTRAINT == "identity":
        made = tl.zeros([BT, P, P], tl.float32) + (a == b).to(tl.float32)[None, :, :]
    else:
        token = block.to(tl.int64) * BT + tl.arange(0, BT)
        live = token < tokens
        inverse = inverse_root_mean_square(x, squares, token, live, tokens, splits, norm_eps, n * C)
        offsets, mask = matrix_offsets(block, tokens, R, n, BT, P, False)
        offsets += 2 * n
        total = reduced(partial, offsets, mask, splits, tokens.to(tl.int64) * R)
        p = total * inverse[:, None, None]
        tl.store(projected + offsets, p, mask=mask)
        shifts = tl.load(bias + 2 * n + a * n + b, mask=(a < n) & (b < n), other=0.0)
        made = p * tl.load(alpha + 2) + shifts[None, :, :]  # logits alpha p + bias
        if CONSTRAINT == "sinkhorn":
            made = project_onto_doubly_stochastic(made, n, iterations, log2_eps, TRANSPOSED, EPS)
    offsets, mask = matrix_offsets(block, tokens, n * n, n, BT, P, TRANSPOSED)
    tl.store(res + offsets, made, mask=mask)


@triton.jit(do_not_specialize=["tokens", "splits", "segments", "mix_blocks", "iterations"])
@no_type_check
def finish_kernel(
    x: tl.tensor, partial: tl.tensor, squares: tl.tensor, alpha: tl.tensor, bias: tl.tensor,
    u: tl.tensor, pre: tl.tensor, post: tl.tensor, res: tl.tensor,
    projected: tl.tensor, inverse_rms: tl.tensor,
    tokens: int, splits: int, segments: int, mix_blocks: int, iterations: int,
    norm_eps: float, hc_eps: float, log2_eps: float,
    n: tl.constexpr, C: tl.constexpr, R: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
    MT: tl.constexpr, P: tl.constexpr,
    CONSTRAINT: tl.constexpr, TRANSPOSED: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    mixes, program = role(mix_blocks)
    if mixes:
        mixing(
            x, partial, squares, alpha, bias, res, projected,
            program, tokens, splits, iterations, norm_eps, log2_eps,
            n, C, R, MT, P, CONSTRAINT, TRANSPOSED, EPS,
        )  # fmt: skip
    else:
        gates_and_read(
            x, partial, squares, alpha, bias, u, pre, post, projected, inverse_rms,
            program // segments, program % segments, segments,
            tokens, splits, norm_eps, hc_eps, n, C, R, BT, BC, P,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "iterations"])
@no_type_check
def one_launch_kernel(
    x: tl.tensor, phi: tl.tensor, alpha: tl.tensor, bias: tl.tensor,
    partial: tl.tensor, squares: tl.tensor,
    u: tl.tensor, pre: tl.tensor, post: tl.tensor, res: tl.tensor,
    projected: tl.tensor, inverse_rms: tl.tensor,
    tokens: int, iterations: int, norm_eps: float, hc_eps: float, log2_eps: float,
    n: tl.constexpr, C: tl.constexpr, R: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    RB: tl.constexpr, BC: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr,
    CONSTRAINT: tl.constexpr, TRANSPOSED: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    zero = block * 0
    project_part(
        x, phi, partial, squares, block, zero, zero, tokens,
        n * C, R, n * C, BT, BK, RB, PRECISION,
    )  # fmt: skip
    # Other threads read these stores below, in another layout: through memory.
    tl.debug_barrier()
    gates_and_read(
        x, partial, squares, alpha, bias, u, pre, post, projected, inverse_rms,
        block, zero, 1, tokens, 1, norm_eps, hc_eps, n, C, R, BT, BC, P,
    )  # fmt: skip
    mixing(
        x, partial, squares, alpha, bias, res, projected,
        block, tokens, 1, iterations, norm_eps, log2_eps,
        n, C, R, BT, P, CONSTRAINT, TRANSPOSED, EPS,
    )  # fmt: skip


def empty_maps(x: Tensor, phi: Tensor) -> ComputedMaps:
    """Return memory for the maps of the streams x."""
    (tokens, n, _), new = x.shape, phi.new_empty
    return ComputedMaps(
        pre=new(tokens, n),
        post=new(tokens, n),
        res=new(tokens, n, n),
        projected=new(tokens, phi.shape[0]),
        inverse_rms=new(tokens),
    )


def coefficients_and_read(
    x: Tensor, maps: MapParameters, settings: Settings
) -> tuple[Tensor, ComputedMaps]:
    """Return u [N, C] and the maps of x [N, n, C]."""
    u = x.new_empty(x.shape[0], x.shape[2])
    return u, _maps_of(x, maps, settings, u)


def coefficients(x: Tensor, maps: MapParameters, settings: Settings) -> ComputedMaps:
    """Return the maps of x [N, n, C]: the bits of `coefficients_and_read`."""
    return _maps_of(x, maps, settings, None)


def _maps_of(x: Tensor, maps: MapParameters, settings: Settings, u: Tensor | None) -> ComputedMaps:
    """Return the maps of x, and fill u where it is not None."""
    phi, alpha, bias = maps
    tokens, n, C = x.shape
    R = phi.shape[0]
    made = empty_maps(x, phi)
    if not tokens:
        return made
    with plan.launching(x):
        if plan.one_launch(n, C, R, x.dtype):
            tile = plan.one_launch_tile(n, C, R, x.dtype)
            one_launch_kernel[(plan.blocks(tokens, tile["BT"]),)](
                x, phi, alpha, bias, phi.new_empty(tokens, R), phi.new_empty(tokens), u, *made,
                tokens, PRECISION=plan.precision(x.dtype), **tile, **_numbers(x, R, settings),
            )  # fmt: skip
            return made
        partial, squares = partial_projections(x.view(tokens, n * C), phi)
        finish(x, partial, squares, maps, u, made, settings)
    return made


def finish(
    x: Tensor, partial: Tensor, squares: Tensor, maps: MapParameters, u: Tensor | None,
    made: ComputedMaps, settings: Settings,
) -> None:  # fmt: skip
    """Fill `made`, and u where it is not None, from the partial sums of x's projections."""
    tokens, n, C = x.shape
    tile = plan.stream_tile(n, C, x.dtype)
    token_blocks = plan.blocks(tokens, tile["BT"])
    segments = 1 if u is None else plan.segments(token_blocks, C, tile["BC"])
    MT = plan.matrix_tokens(n)
    mix_blocks = plan.blocks(tokens, MT)  # programs that make matrices; the others gates and u
    finish_kernel[(mix_blocks + token_blocks * segments,)](
        x, partial, squares, maps.alpha, maps.bias, u, *made,
        tokens, len(partial), segments, mix_blocks, MT=MT,
        **tile, **_numbers(x, partial.shape[2], settings),
    )  # fmt: skip


def _numbers(x: Tensor, rows: int, settings: Settings) -> dict[str, Any]:
    return {
        "iterations": settings.iterations,
        "norm_eps": settings.norm_eps,
        "hc_eps": settings.hc_eps,
        "n": x.shape[1],
        "C": x.shape[2],
        "R": rows,
        "P": plan.padded(x.shape[1]),
        "CONSTRAINT": settings.constraint,
        **epsilon(settings.transposed, settings.hc_eps),
    }
