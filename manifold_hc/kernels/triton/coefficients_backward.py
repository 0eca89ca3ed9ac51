"""Backward of coefficients and read, and of a boundary between two sublayers.

The first launch reads the streams for their inner products and goes back through the gates. Other
programs go back through Sinkhorn: in the same launch, or in the next where the link brings a
gradient of res. Together they make dp, the gradient of every projection; `gradient` does the rest.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from manifold_hc.kernels.triton import gradient, plan
from manifold_hc.kernels.triton.products import link_and_read, through_norm
from manifold_hc.kernels.triton.read import columns_of
from manifold_hc.kernels.triton.sinkhorn import (
    doubly_stochastic_backward,
    epsilon,
    history,
    matrix_offsets,
    role,
)
from manifold_hc.kernels.values import (
    BoundaryGradients,
    InputNorm,
    MapParameters,
    ReadingGradients,
    SavedBoundary,
    SavedMaps,
    Settings,
)


@triton.jit
@no_type_check
def _mixing_backward(
    grad_res, mixed, projected, alpha, bias, grad, sums,
    block, blocks: int, tokens: int, iterations: int, log2_eps: float,
    n: tl.constexpr, R: tl.constexpr, BT: tl.constexpr, P: tl.constexpr,
    CONSTRAINT: tl.constexpr, TRANSPOSED: tl.constexpr, EPS: tl.constexpr, HISTORY: tl.constexpr,
):  # fmt: skip
    """Store dp of the rows of res, and this block's sums for bias and alpha.

    The gradient of res is `grad_res` plus `mixed`, [N, n, n] each; either may be None.
    """
    offsets, mask = matrix_offsets(block, tokens, R, n, BT, P, False)
    p = tl.load(projected + 2 * n + offsets, mask=mask, other=0.0)
    gate = tl.load(alpha + 2)
    a = tl.arange(0, P)[:, None]
    b = tl.arange(0, P)[None, :]
    real = (a < n) & (b < n)
    found = tl.zeros([BT, P, P], tl.float32)
    places, live = matrix_offsets(block, tokens, n * n, n, BT, P, TRANSPOSED)
    if grad_res is not None:
        found += tl.load(grad_res + places, mask=live, other=0.0)
    if mixed is not None:
        found += tl.load(mixed + places, mask=live, other=0.0)
    if (grad_res is not None or mixed is not None) and CONSTRAINT == "sinkhorn":
        shifts = tl.load(bias + 2 * n + a * n + b, mask=real, other=0.0)
        logits = p * gate + shifts[None, :, :]
        found = doubly_stochastic_backward(
            found, logits, n, iterations, log2_eps, TRANSPOSED, EPS, HISTORY
        )
    tl.store(grad + 2 * n + offsets, found * gate, mask=mask)  # dp = dlogit alpha
    # dbias = sum dlogit, dalpha = sum dlogit p
    place = (a * n + b).to(tl.int64) * blocks + block
    tl.store(sums + place, tl.sum(found, 0), mask=real)
    whole = tl.sum(tl.sum(tl.sum(found * p, 0), 0), 0)
    tl.store(sums + (n * n) * blocks.to(tl.int64) + block, whole)


@triton.jit
@no_type_check
def _gates_backward(
    outer, projected, alpha, bias, grad, sums, added, pre, token, live, block, blocks: int,
    slope, hc_eps: float, n: tl.constexpr, R: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Store dp of one kind of gate, rows FIRST to FIRST + n: `slope` times a sigmoid.

    The gates' gradient is `outer` [N, n] plus `added`, n vectors; either may be None. Store the
    gates in `pre` [N, n] unless that is None.
    """
    KIND: tl.constexpr = FIRST // n
    gate = tl.load(alpha + KIND)
    whole = tl.zeros([token.shape[0]], tl.float32)
    for i in tl.static_range(n):
        found = tl.zeros([token.shape[0]], tl.float32)
        if outer is not None:
            found += tl.load(outer + token * n + i, mask=live, other=0.0)
        if added is not None:
            found += added[i]
        p = tl.load(projected + token * R + FIRST + i, mask=live, other=0.0)
        s = tl.sigmoid(p * gate + tl.load(bias + FIRST + i))
        if pre is not None:
            tl.store(pre + token * n + i, s + hc_eps, mask=live)
        found *= slope * s * (1 - s)  # dlogit, through the sigmoid
        # dp = dlogit alpha, dbias = sum dlogit, dalpha = sum dlogit p
        tl.store(grad + token * R + FIRST + i, found * gate, mask=live)
        tl.store(sums + (FIRST + i) * blocks.to(tl.int64) + block, tl.sum(found, 0))
        whole += found * p
    tl.store(sums + (2 * n + KIND) * blocks.to(tl.int64) + block, tl.sum(whole, 0))


@triton.jit
@no_type_check
def _reading(given, projected, alpha, bias, token, live, hc_eps: float, n: tl.constexpr, R):
    """Return the read weights of u, n vectors: `given`, or the new pre where that is None."""
    if given is not None:
        return columns_of(given, token, live, n, 0, n)
    found = ()
    gate = tl.load(alpha)
    for i in tl.static_range(n):
        p = tl.load(projected + token * R + i, mask=live, other=0.0)
        found = found + (tl.sigmoid(p * gate + tl.load(bias + i)) + hc_eps,)
    return found


@triton.jit(do_not_specialize=["tokens", "gate_blocks", "mix_blocks", "iterations"])
@no_type_check
def projections_gradient_kernel(
    grad_u: tl.tensor, grad_pre: tl.tensor, grad_post: tl.tensor, grad_res: tl.tensor,
    link: tl.tensor, x: tl.tensor, alpha: tl.tensor, bias: tl.tensor, projected: tl.tensor,
    given: tl.tensor, weight: tl.tensor,
    grad: tl.tensor, pre: tl.tensor, dgiven: tl.tensor, norms: tl.tensor, mixed: tl.tensor,
    sums: tl.tensor,
    tokens: int, gate_blocks: int, mix_blocks: int, iterations: int,
    hc_eps: float, input_eps: float, log2_eps: float,
    n: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    BT: tl.constexpr, L: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr,
    MT: tl.constexpr, P: tl.constexpr,
    CONSTRAINT: tl.constexpr, TRANSPOSED: tl.constexpr, EPS: tl.constexpr, HISTORY: tl.constexpr,
):  # fmt: skip
    """Store dp [N, R], the gradient of the projections, pre, and sums for bias and alpha.

    With `link` also its products with the streams in `mixed`, with read weights `given` their
    gradient in `dgiven`, with `weight` the norm's r and k in `norms`.
    """
    mixes, block = role(mix_blocks)
    if mixes:
        if CONSTRAINT != "identity":
            _mixing_backward(
                grad_res, None, projected, alpha, bias, grad,
                sums + (2 * n + 2) * gate_blocks.to(tl.int64),
                block, mix_blocks, tokens, iterations, log2_eps,
                n, R, MT, P, CONSTRAINT, TRANSPOSED, EPS, HISTORY,
            )  # fmt: skip
    else:
        token = block.to(tl.int64) * BT + tl.arange(0, BT)
        live = token < tokens
        reading = None
        if weight is not None:
            reading = _reading(given, projected, alpha, bias, token, live, hc_eps, n, R)
        inner = None
        if grad_u is not None:
            inner = link_and_read(
                grad_u, link, x, weight, reading, mixed, token, live, 0, n, C, L, V, ROWS, True
            )
            if weight is not None:
                inner = through_norm(inner, norms, token, live, input_eps, n, C)
        elif link is not None:
            link_and_read(None, link, x, None, None, mixed, token, live, 0, n, C, L, V, ROWS, False)
        if link is not None:
            for first in range(ROWS, n, ROWS):
                link_and_read(
                    None, link, x, None, None, mixed, token, live, first, n, C, L, V, ROWS, False
                )
        if given is not None:
            if grad_u is not None:
                for i in tl.static_range(n):
                    tl.store(dgiven + token * n + i, inner[i], mask=live)
            inner = None
        _gates_backward(
            grad_pre, projected, alpha, bias, grad, sums, inner, pre,
            token, live, block, gate_blocks, 1.0, hc_eps, n, R, 0,
        )  # fmt: skip
        _gates_backward(
            grad_post, projected, alpha, bias, grad, sums, None, None,
            token, live, block, gate_blocks, 2.0, hc_eps, n, R, n,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "blocks", "iterations"])
@no_type_check
def mixing_backward_kernel(
    grad_res: tl.tensor, mixed: tl.tensor, projected: tl.tensor, alpha: tl.tensor, bias: tl.tensor,
    grad: tl.tensor, sums: tl.tensor, tokens: int, blocks: int, iterations: int, log2_eps: float,
    n: tl.constexpr, R: tl.constexpr, MT: tl.constexpr, P: tl.constexpr,
    CONSTRAINT: tl.constexpr, TRANSPOSED: tl.constexpr, EPS: tl.constexpr, HISTORY: tl.constexpr,
):  # fmt: skip
    _mixing_backward(
        grad_res, mixed, projected, alpha, bias, grad, sums,
        tl.program_id(0), blocks, tokens, iterations, log2_eps,
        n, R, MT, P, CONSTRAINT, TRANSPOSED, EPS, HISTORY,
    )  # fmt: skip


def coefficients_and_read_backward(
    grads: ReadingGradients,
    x: Tensor,
    maps: MapParameters,
    saved: SavedMaps,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, phi, alpha and bias."""
    found = _backward(grads, None, x, None, maps, None, saved, settings)
    return found.written, found.phi, found.alpha, found.bias


def boundary_backward(
    grad_written: Tensor | None,
    grads: ReadingGradients,
    boundary: SavedBoundary,
    maps: MapParameters,
    norm: InputNorm | None,
    saved: SavedMaps,
    settings: Settings,
) -> BoundaryGradients:
    """Return the gradients of all inputs."""
    write = gradient.Write(grad_written, boundary.y, boundary.post)
    return _backward(grads, write, boundary.written, boundary.pre, maps, norm, saved, settings)


def _backward(
    grads: ReadingGradients, write: gradient.Write | None, x: Tensor, pre: Tensor | None,
    maps: MapParameters, norm: InputNorm | None, saved: SavedMaps, settings: Settings,
) -> BoundaryGradients:  # fmt: skip
    phi, alpha, bias = maps
    projected = saved.projected
    tokens, n, C = x.shape
    R = phi.shape[0]
    constraint, iterations = settings.constraint, settings.iterations
    link = grads.link if settings.learns and constraint != "identity" else None
    # Without a gradient of u nothing passes through the norm.
    weight = None if norm is None or grads.u is None else norm.weight
    input_eps = 0.0 if norm is None else norm.eps
    tile = plan.product_tile(n, C, x.dtype, weight is not None)
    MT = plan.matrix_tokens(n)
    gate_blocks = plan.blocks(tokens, tile["BT"])
    mix_blocks = 0 if constraint == "identity" else plan.blocks(tokens, MT)
    # Matrices run in the same launch, unless they need the products with the link first.
    shared_blocks = mix_blocks if link is None else 0
    grad = torch.empty_like(projected)
    sums = phi.new_empty((2 * n + 2) * gate_blocks + (R - 2 * n + 1) * mix_blocks)
    # Read weights: those given, or the new coefficients' own, which the kernel stores again.
    own_pre = phi.new_empty(tokens, n) if pre is None else None
    dpre = None if pre is None else torch.empty_like(pre)
    if dpre is not None and grads.u is None:
        dpre.zero_()
    norms = None if weight is None else phi.new_empty(tokens, 2)
    mixed = None if link is None else torch.empty_like(saved.res)
    matrices = {
        "n": n, "R": R, "MT": MT, "P": plan.padded(n), "CONSTRAINT": constraint,
        "HISTORY": history(iterations), **epsilon(settings.transposed, settings.hc_eps),
    }  # fmt: skip
    if tokens:
        with plan.launching(x):
            projections_gradient_kernel[(shared_blocks + gate_blocks,)](
                grads.u, grads.pre, grads.post, grads.res, link, x, alpha, bias, projected, pre,
                weight, grad, own_pre, dpre, norms, mixed, sums,
                tokens, gate_blocks, shared_blocks, iterations, settings.hc_eps, input_eps,
                C=C, ROWS=plan.product_rows(n), **tile, **matrices,
            )  # fmt: skip
            if link is not None:
                mixing_backward_kernel[(mix_blocks,)](
                    grads.res, mixed, projected, alpha, bias,
                    grad, sums[(2 * n + 2) * gate_blocks :], tokens, mix_blocks, iterations,
                    **matrices, **plan.threads(4, plan.registers(n)),
                )  # fmt: skip
    reads = own_pre if pre is None else pre
    mix = gradient.Mixed(grads.u, reads, weight, norms, grads.link, saved.res)
    found = gradient.of_streams(grad, projected, saved.inverse_rms, x, phi, mix, write)
    norm_weight = None if norm is None else norm.weight
    return gradient.summed_with_gates(found, sums, gate_blocks, mix_blocks, maps, norm_weight, dpre)
