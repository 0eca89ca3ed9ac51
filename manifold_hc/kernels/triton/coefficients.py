"""Coefficients and read: two launches over the streams, or one where a block of them stays near.

The first launch projects (`project`). The second turns projections into gates, matrices and u:
some of its programs run Sinkhorn while the others, which need only the gates, move the streams.
"""

from typing import Any, NamedTuple, no_type_check

import triton
import triton.language as tl
from torch import Tensor

from manifold_hc.kernels.operators import Settings
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


@triton.jit
@no_type_check
def gates_and_read(
    x, partial, squares, alpha, bias, u, pre, post, projected, inverse_rms,
    block, segment, segments: int, tokens: int, splits: int, norm_eps: float, hc_eps: float,
    n: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """One token block's u over one segment; segment 0 stores pre, post, their p and 1 / rms.

    u may be None.
    """
    token = block.to(tl.int64) * BT + tl.arange(0, BT)
    live = token < tokens
    inverse = inverse_root_mean_square(x, squares, token, live, tokens, splits, norm_eps, n * C)
    j = tl.arange(0, 2 * P)[None, :]
    mask = live[:, None] & (j < 2 * n)
    offsets = token[:, None] * R + j
    total = reduced(partial, offsets, mask, splits, tokens.to(tl.int64) * R)
    p = total * inverse[:, None]
    is_post = j >= n
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
    """One token block's res, and the projections it comes from."""
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
        made = p * tl.load(alpha + 2) + shifts[None, :, :]
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
    # What one thread stored above, others read below: through memory, in another layout.
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


class Coefficients(NamedTuple):
    """What is made of the streams, in the order in which it is returned."""

    u: Tensor | None
    pre: Tensor
    post: Tensor
    res: Tensor
    projected: Tensor
    inverse_rms: Tensor

    @classmethod
    def empty(cls, x: Tensor, phi: Tensor, u: Tensor | None) -> "Coefficients":
        """Room for all of it but u, which is given."""
        tokens, n, _ = x.shape
        pre, post, projected = (phi.new_empty(tokens, size) for size in (n, n, phi.shape[0]))
        res, inverse_rms = phi.new_empty(tokens, n, n), phi.new_empty(tokens)
        return cls(u, pre, post, res, projected, inverse_rms)


def coefficients_and_read(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, settings: Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """u [N, C], pre [N, n], post [N, n], res [N, n, n], projected [N, R], 1 / rms [N]."""
    u = x.new_empty(x.shape[0], x.shape[2])
    return u, *_made(x, phi, alpha, bias, settings, u)[1:]


def coefficients(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, settings: Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `coefficients_and_read` returns without u, the same bits."""
    return _made(x, phi, alpha, bias, settings, None)[1:]


def _made(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, settings: Settings, u: Tensor | None
) -> Coefficients:
    tokens, n, C = x.shape
    R = phi.shape[0]
    made = Coefficients.empty(x, phi, u)
    if not tokens:
        return made
    with plan.launching(x):
        if plan.one_launch(n, C, R, x.dtype):
            tile = plan.one_launch_tile(n, C, R, x.dtype)
            one_launch_kernel[(plan.blocks(tokens, tile["BT"]),)](
                x, phi, alpha, bias, phi.new_empty(tokens, R), phi.new_empty(tokens), *made,
                tokens, PRECISION=plan.precision(x.dtype), **tile, **_numbers(x, R, settings),
            )  # fmt: skip
            return made
        partial, squares = partial_projections(x.view(tokens, n * C), phi)
        finish(x, partial, squares, alpha, bias, made, settings)
    return made


def finish(
    x: Tensor, partial: Tensor, squares: Tensor, alpha: Tensor, bias: Tensor,
    made: Coefficients, settings: Settings,
) -> None:  # fmt: skip
    """Fills `made` from the pieces of x's projections; u where it has room for it."""
    tokens, n, C = x.shape
    tile = plan.stream_tile(n, C, x.dtype)
    token_blocks = plan.blocks(tokens, tile["BT"])
    segments = 1 if made.u is None else plan.segments(token_blocks, C, tile["BC"])
    MT = plan.matrix_tokens(n)
    mix_blocks = plan.blocks(tokens, MT)
    finish_kernel[(mix_blocks + token_blocks * segments,)](
        x, partial, squares, alpha, bias, *made,
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
