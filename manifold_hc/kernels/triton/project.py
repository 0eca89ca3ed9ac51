"""`v phi^T / rms(v)`: product and sum of squares in one read of v, the division afterwards.

`plan` cuts a row of v into splits that depend on its length alone; a second launch adds their sums
in order.
"""

from typing import no_type_check

import triton
import triton.language as tl
from torch import Tensor

from manifold_hc.kernels.triton import gradient, plan

HUGE_SCALE = tl.constexpr(2.0**-80)
"""Scale of values whose sum of squares overflows float."""


@triton.jit
@no_type_check
def project_part(
    v, phi, partial, squares, block, row_block, split, tokens: int,
    K: tl.constexpr, R: tl.constexpr, CHUNK: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, RB: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store one block of `partial[split]` [N, R] and, from row block 0, `squares[split]` [N]."""
    token = block.to(tl.int64) * BT + tl.arange(0, BT)
    live = token < tokens
    r = row_block * RB + tl.arange(0, RB)
    products = tl.zeros([BT, RB], tl.float32)
    norms = tl.zeros([BT], tl.float32)
    for start in range(split * CHUNK, tl.minimum(split * CHUNK + CHUNK, K), BK):
        k = start + tl.arange(0, BK)
        inside = k < K
        mask = live[:, None] & inside[None, :]
        values = tl.load(v + token[:, None] * K + k[None, :], mask=mask, other=0.0).to(tl.float32)
        mask = inside[:, None] & (r < R)[None, :]
        weights = tl.load(phi + r[None, :] * K + k[:, None], mask=mask, other=0.0)
        products = tl.dot(values, weights, products, input_precision=PRECISION)  # v phi^T
        norms += tl.sum(values * values, 1)  # sum v^2
    first = split.to(tl.int64) * tokens
    mask = live[:, None] & (r < R)[None, :]
    tl.store(partial + (first + token[:, None]) * R + r[None, :], products, mask=mask)
    tl.store(squares + first + token, norms, mask=tl.where(row_block == 0, live, False))


@triton.jit
@no_type_check
def reduced(partial, offsets, mask, splits: int, stride):
    """Return the sum over the splits, in order, of values at distance `stride`."""
    total = tl.load(partial + offsets, mask=mask, other=0.0)
    for split in range(1, splits):
        total += tl.load(partial + split * stride + offsets, mask=mask, other=0.0)
    return total


@triton.jit
@no_type_check
def inverse_root_mean_square(
    v, squares, token, live, tokens: int, splits: int, norm_eps: float, K: tl.constexpr
):
    """Return 1 / rms of the tokens [BT] of v [N, K], from the partial sums of squares.

    Where these overflow float, from v once more.
    """
    total = reduced(squares, token, live, splits, tokens.to(tl.int64))
    inverse = tl.rsqrt(total / K + norm_eps)
    if tl.max(total, 0) == float("inf"):
        inverse = tl.where(total == float("inf"), _inverse_of_huge(v, token, live, K), inverse)
    return inverse


@triton.jit
@no_type_check
def _inverse_of_huge(v, token, live, K: tl.constexpr):
    """Return 1 / rms of the tokens [BT] from scaled values, next to which any epsilon vanishes."""
    BK: tl.constexpr = 16
    total = tl.zeros([token.shape[0]], tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        mask = live[:, None] & (k < K)[None, :]
        values = tl.load(v + token[:, None] * K + k[None, :], mask=mask, other=0.0).to(tl.float32)
        values *= HUGE_SCALE
        total += tl.sum(values * values, 1)
    return tl.rsqrt(total / K) * HUGE_SCALE


@triton.jit(do_not_specialize=["tokens"])
@no_type_check
def project_kernel(
    v: tl.tensor, phi: tl.tensor, partial: tl.tensor, squares: tl.tensor, tokens: int,
    K: tl.constexpr, R: tl.constexpr, CHUNK: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, RB: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    project_part(
        v, phi, partial, squares, tl.program_id(0), tl.program_id(2), tl.program_id(1), tokens,
        K, R, CHUNK, BT, BK, RB, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "splits"])
@no_type_check
def normalise_kernel(
    v: tl.tensor, partial: tl.tensor, squares: tl.tensor, projected: tl.tensor,
    inverse_rms: tl.tensor, tokens: int, splits: int, norm_eps: float,
    K: tl.constexpr, R: tl.constexpr, BT: tl.constexpr, RB: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    live = token < tokens
    inverse = inverse_root_mean_square(v, squares, token, live, tokens, splits, norm_eps, K)
    tl.store(inverse_rms + token, inverse, mask=live)
    for start in range(0, R, RB):
        r = start + tl.arange(0, RB)
        mask = live[:, None] & (r < R)[None, :]
        offsets = token[:, None] * R + r[None, :]
        total = reduced(partial, offsets, mask, splits, tokens.to(tl.int64) * R)
        tl.store(projected + offsets, total * inverse[:, None], mask=mask)


def partial_projections(v: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
    """Return partial sums of `v phi^T` [splits, N, R] and `sum v^2` [splits, N]."""
    tokens, K = v.shape
    R = phi.shape[0]
    tile = plan.projection_tile(R, K, v.dtype)
    splits = plan.blocks(K, tile["CHUNK"])
    partial, squares = phi.new_empty(splits, tokens, R), phi.new_empty(splits, tokens)
    if tokens:
        grid = (plan.blocks(tokens, tile["BT"]), splits, plan.blocks(R, tile["RB"]))
        with plan.launching(v):
            project_kernel[grid](
                v, phi, partial, squares, tokens,
                K=K, R=R, PRECISION=plan.precision(v.dtype), **tile,
            )  # fmt: skip
    return partial, squares


def project(v: Tensor, phi: Tensor, norm_eps: float) -> tuple[Tensor, Tensor]:
    """Return `v phi^T / rms(v)` [N, R] and 1 / rms(v) [N] of v [N, K] and phi [R, K]."""
    tokens, K = v.shape
    R = phi.shape[0]
    partial, squares = partial_projections(v, phi)
    projected, inverse_rms = phi.new_empty(tokens, R), phi.new_empty(tokens)
    if tokens:
        tile = plan.normalise_tile(R)
        with plan.launching(v):
            normalise_kernel[(plan.blocks(tokens, tile["BT"]),)](
                v, partial, squares, projected, inverse_rms, tokens, len(partial), norm_eps,
                K=K, R=R, **tile,
            )  # fmt: skip
    return projected, inverse_rms


def project_backward(
    grad: Tensor, v: Tensor, phi: Tensor, projected: Tensor, inverse_rms: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of v, in v's dtype, and of phi."""
    found = gradient.of_streams(
        grad, projected, inverse_rms, v.unsqueeze(1), phi, gradient.Mixed(), None
    )
    return found.x.squeeze(1), gradient.summed(phi, found.phis)
