"""Sinkhorn-Knopp with a token's whole matrix in registers, and its exact backward.

With `z` the logarithm (base 2) of the first matrix, every iterate is `2^(z + r + c)` for a row
potential r and a column potential c. A step replaces one of them,

    c'[b] = -log2(sum_a 2^(z[a, b] + r[a]) + eps 2^-c[b])

and no sum underflows to 0/0. Two vectors represent an iterate, so the backward keeps the potentials
of all iterations on chip and rebuilds each matrix from them. In terms of `G = dM * M`, the gradient
of log M, the reverse of the step that made M is `G - M sum(G)` over the normalised axis, with and
without eps. Both presets take columns first (METHOD 2.3, 2.4).
"""

import math
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from manifold_hc.kernels.triton import plan

LOG2_E = tl.constexpr(math.log2(math.e))
MINUS_INFINITY = tl.constexpr(-1e30)
"""Logarithm of an entry beyond n: finite, so that the difference of two is not NaN."""


@triton.jit
@no_type_check
def _potential(a, old, valid, axis: tl.constexpr, log2_eps: float, EPS: tl.constexpr):
    """Return the new potential of one side from `a = z + the other side's potential`."""
    # -log2(sum 2^a + eps 2^-old), relative to the largest term
    top = tl.max(a, axis)
    if EPS:
        top = tl.maximum(top, log2_eps - old)
    total = tl.sum(tl.exp2(a - tl.expand_dims(top, axis)), axis)
    if EPS:
        total += tl.exp2(log2_eps - old - top)
    return tl.where(valid, -top - tl.log2(total), 0.0)


@triton.jit
@no_type_check
def _logarithms(logits, valid, log2_eps: float, TRANSPOSED: tl.constexpr, EPS: tl.constexpr):
    """Return z and, for DeepSeek-V4, the softmax inside it (else z again)."""
    z = tl.where(valid, logits * LOG2_E, MINUS_INFINITY)
    softmax = z
    if TRANSPOSED:
        z -= tl.max(z, 2)[:, :, None]
        z -= tl.log2(tl.sum(tl.exp2(z), 2))[:, :, None]
        softmax = tl.exp2(z)
        if EPS:
            z = tl.log2(softmax + tl.exp2(log2_eps))
        z = tl.where(valid, z, MINUS_INFINITY)
    return z, softmax


@triton.jit
@no_type_check
def project_onto_doubly_stochastic(
    logits, n: tl.constexpr, iterations: int, log2_eps: float,
    TRANSPOSED: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Return the last iterate of logits [tokens, P, P], zero beyond n, in their orientation."""
    P: tl.constexpr = logits.shape[1]
    real = tl.arange(0, P) < n
    vector = real[None, :]
    z, _ = _logarithms(logits, real[None, :, None] & real[None, None, :], log2_eps, TRANSPOSED, EPS)
    r = tl.zeros([logits.shape[0], P], tl.float32)
    c = tl.zeros([logits.shape[0], P], tl.float32)
    for _ in range(iterations - 1):
        c = _potential(z + r[:, :, None], c, vector, 1, log2_eps, EPS)
        r = _potential(z + c[:, None, :], r, vector, 2, log2_eps, EPS)
    c = _potential(z + r[:, :, None], c, vector, 1, log2_eps, EPS)
    if TRANSPOSED:
        return tl.exp2(z + r[:, :, None] + c[:, None, :])
    # The last rows by division: their sums are then exact to one rounding.
    a = z + c[:, None, :]
    last = tl.exp2(a - tl.max(a, 2)[:, :, None])
    return last / tl.sum(last, 2)[:, :, None]


@triton.jit
@no_type_check
def _kept(history, steps, step):
    """Return the potential [tokens, P] of one step; zeros for step -1."""
    return tl.sum(tl.where(steps == step, history, 0.0), 0)


@triton.jit
@no_type_check
def _undone(G, z, r, c, axis: tl.constexpr):
    # Gradient before the normalisation that made M: G - M sum(G).
    M = tl.exp2(z + r[:, :, None] + c[:, None, :])
    return G - M * tl.expand_dims(tl.sum(G, axis), axis)


@triton.jit
@no_type_check
def doubly_stochastic_backward(
    grad, logits, n: tl.constexpr, iterations: int, log2_eps: float,
    TRANSPOSED: tl.constexpr, EPS: tl.constexpr, HISTORY: tl.constexpr,
):  # fmt: skip
    """Return the logits' gradient; grad [tokens, P, P] is zero beyond n, HISTORY >= iterations."""
    BT: tl.constexpr = logits.shape[0]
    P: tl.constexpr = logits.shape[1]
    real = tl.arange(0, P) < n
    vector = real[None, :]
    valid = real[None, :, None] & real[None, None, :]
    z, softmax = _logarithms(logits, valid, log2_eps, TRANSPOSED, EPS)
    # Steps on the first axis, which stays within a thread: selecting one needs no shuffle.
    steps = tl.arange(0, HISTORY)[:, None, None]
    rows = tl.zeros([HISTORY, BT, P], tl.float32)
    columns = tl.zeros([HISTORY, BT, P], tl.float32)
    r = tl.zeros([BT, P], tl.float32)
    c = tl.zeros([BT, P], tl.float32)
    for step in range(iterations):
        c = _potential(z + r[:, :, None], c, vector, 1, log2_eps, EPS)
        columns = tl.where(steps == step, c[None, :, :], columns)
        r = _potential(z + c[:, None, :], r, vector, 2, log2_eps, EPS)
        rows = tl.where(steps == step, r[None, :, :], rows)
    # Reverse sweep, from G = dM * M of the last iterate
    last = iterations - 1
    if TRANSPOSED:  # ends with columns
        r = _kept(rows, steps, last - 1)
        G = grad * tl.exp2(z + r[:, :, None] + c[:, None, :])
        G = _undone(G, z, r, c, 1)
        last -= 1
    else:
        G = grad * tl.exp2(z + r[:, :, None] + c[:, None, :])
    for back in range(last + 1):
        c = _kept(columns, steps, last - back)
        G = _undone(G, z, r, c, 2)
        r = _kept(rows, steps, last - back - 1)
        G = _undone(G, z, r, c, 1)
    if TRANSPOSED:  # through comb = softmax + eps, then the softmax
        if EPS:
            G *= softmax / (softmax + tl.exp2(log2_eps))
        G -= softmax * tl.sum(G, 2)[:, :, None]
    return G


@triton.jit
@no_type_check
def matrix_offsets(
    block, tokens: int, stride: tl.constexpr, n: tl.constexpr,
    BT: tl.constexpr, P: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Return offsets and mask of [a, b] in the matrices of a token block, at distance `stride`."""
    token = block.to(tl.int64) * BT + tl.arange(0, BT)[:, None, None]
    a = tl.arange(0, P)[None, :, None]
    b = tl.arange(0, P)[None, None, :]
    within = (b * n + a) if TRANSPOSED else (a * n + b)
    return token * stride + within, (token < tokens) & (a < n) & (b < n)


@triton.jit
@no_type_check
def role(mix_blocks: int):
    """Return True for a program that works on matrices, and its index among its kind.

    The kinds alternate evenly: matrices compute much and move little, the others the reverse.
    """
    program = tl.program_id(0)
    stride = tl.num_programs(0) // tl.maximum(mix_blocks, 1)
    before = tl.minimum(tl.cdiv(program, stride), mix_blocks)
    mixes = (program % stride == 0) & (program // stride < mix_blocks)
    return mixes, tl.where(mixes, before, program - before)


@triton.jit(do_not_specialize=["tokens", "iterations"])
@no_type_check
def sinkhorn_kernel(
    logits: tl.tensor, res: tl.tensor, tokens: int, iterations: int, log2_eps: float,
    n: tl.constexpr, BT: tl.constexpr, P: tl.constexpr,
    TRANSPOSED: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    offsets, mask = matrix_offsets(block, tokens, n * n, n, BT, P, False)
    values = tl.load(logits + offsets, mask=mask, other=0.0)
    made = project_onto_doubly_stochastic(values, n, iterations, log2_eps, TRANSPOSED, EPS)
    offsets, mask = matrix_offsets(block, tokens, n * n, n, BT, P, TRANSPOSED)
    tl.store(res + offsets, made, mask=mask)


@triton.jit(do_not_specialize=["tokens", "iterations"])
@no_type_check
def sinkhorn_backward_kernel(
    grad: tl.tensor, logits: tl.tensor, out: tl.tensor,
    tokens: int, iterations: int, log2_eps: float,
    n: tl.constexpr, BT: tl.constexpr, P: tl.constexpr,
    TRANSPOSED: tl.constexpr, EPS: tl.constexpr, HISTORY: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    offsets, mask = matrix_offsets(block, tokens, n * n, n, BT, P, TRANSPOSED)
    incoming = tl.load(grad + offsets, mask=mask, other=0.0)
    offsets, mask = matrix_offsets(block, tokens, n * n, n, BT, P, False)
    values = tl.load(logits + offsets, mask=mask, other=0.0)
    found = doubly_stochastic_backward(
        incoming, values, n, iterations, log2_eps, TRANSPOSED, EPS, HISTORY
    )
    tl.store(out + offsets, found, mask=mask)


def epsilon(transposed: bool, hc_eps: float) -> dict[str, float | bool]:
    """Return the kernels' arguments for the order of steps and the epsilon of denominators."""
    has_one = transposed and hc_eps > 0
    return {
        "log2_eps": math.log2(hc_eps) if has_one else 0.0,
        "EPS": has_one,
        "TRANSPOSED": transposed,
    }


def history(iterations: int) -> int:
    """Return the number of steps whose potentials the backward can hold."""
    return max(2, plan.power_of_two(iterations))


def sinkhorn(logits: Tensor, iterations: int, transposed: bool, hc_eps: float) -> Tensor:
    """Return res [N, o, i] of logits [N, n, n]."""
    tokens, n, _ = logits.shape
    res = torch.empty_like(logits)
    tile = plan.matrix_tile(n)
    if tokens:
        with plan.launching(logits):
            sinkhorn_kernel[(plan.blocks(tokens, tile["BT"]),)](
                logits, res, tokens, iterations,
                n=n, **tile, **epsilon(transposed, hc_eps),
            )  # fmt: skip
    return res


def sinkhorn_backward(
    grad: Tensor, logits: Tensor, iterations: int, transposed: bool, hc_eps: float
) -> Tensor:
    """Return the gradient of logits [N, n, n], that of the finite iteration."""
    tokens, n, _ = logits.shape
    out = torch.empty_like(logits)
    tile = plan.matrix_tile(n)
    if tokens:
        with plan.launching(logits):
            sinkhorn_backward_kernel[(plan.blocks(tokens, tile["BT"]),)](
                grad, logits, out, tokens, iterations,
                n=n, HISTORY=history(iterations), **tile, **epsilon(transposed, hc_eps),
            )  # fmt: skip
    return out
