"""Second read of the streams in backward: their whole gradient and that of phi, in one pass.

    dx[i] = dx' + res^T link + pre[i] du + dq phi[i] - scale x[i]      dphi = dq^T x
    dq = dp / rms      scale = <dp, p> / (rms^2 n C)

for the projections p and their gradient dp; the term of `scale` is the rank-one correction of the
RMS norm. A program owns some channels of all streams and a range of tokens; a last launch adds
phi's sums over the ranges in a fixed order. Where a write made the streams, the same pass makes the
gradients of its y and post from dx.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from manifold_hc.kernels.triton import plan
from manifold_hc.kernels.values import BoundaryGradients, MapParameters

HUGE_INVERSE = tl.constexpr(2.0**-50)
HUGE_ROOT = tl.constexpr(2.0**63)
HUGE_SHARE = tl.constexpr(2.0**-126)
"""Below HUGE_INVERSE the square of 1 / rms underflows float: HUGE_ROOT / rms is squared instead."""


class Mixed(NamedTuple):
    """Gradients that reach the streams through the read and the next write, not the projections."""

    grad_u: Tensor | None = None
    reading: Tensor | None = None
    weight: Tensor | None = None
    norms: Tensor | None = None
    link: Tensor | None = None
    res: Tensor | None = None


class Write(NamedTuple):
    """The write that made the streams, and the gradient of the written streams themselves."""

    grad: Tensor | None
    y: Tensor | None
    post: Tensor | None


class Pieces(NamedTuple):
    """Results of the pass over the streams: gradients, or partial sums with one dimension more."""

    x: Tensor
    y: Tensor | None
    posts: Tensor | None
    phis: Tensor
    weights: Tensor | None


@triton.jit
@no_type_check
def _phi_tile(phi, r, j, BC: tl.constexpr, c0, n: tl.constexpr, C: tl.constexpr, R: tl.constexpr):
    """Load rows r of phi at the channels [c0, c0 + BC) of all streams: [rows, P BC]."""
    c = c0 + j % BC
    mask = (r < R)[:, None] & ((j // BC < n) & (c < C))[None, :]
    return tl.load(phi + r[:, None] * (n * C) + (j // BC * C + c)[None, :], mask=mask, other=0.0)


@triton.jit
@no_type_check
def _through_projections(
    grad, projected, phi, inverse, local, live, j, c0, n: tl.constexpr, C: tl.constexpr,
    R: tl.constexpr, BC: tl.constexpr, RB: tl.constexpr, ROW_BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return `dq phi` [BT, P BC] and `<dp, p>` [BT], one block of rows after another."""
    total = tl.zeros([local.shape[0]], tl.float32)
    product = tl.zeros([local.shape[0], j.shape[0]], tl.float32)
    for b in tl.static_range(ROW_BLOCKS):
        r = b * RB + tl.arange(0, RB)
        mask = live[:, None] & (r < R)[None, :]
        offsets = local[:, None] * R + r[None, :]
        dp = tl.load(grad + offsets, mask=mask, other=0.0)
        total += tl.sum(dp * tl.load(projected + offsets, mask=mask, other=0.0), 1)
        weights = _phi_tile(phi, r, j, BC, c0, n, C, R)
        product = tl.dot(dp * inverse[:, None], weights, product, input_precision=PRECISION)
    return product, total


@triton.jit
@no_type_check
def _through_norm(
    dout, reading, streams, weight, norms, dweights, local, live, c, C: tl.constexpr, TYPE
):  # fmt: skip
    """Return du [BT, BC] before the norm, and dweights with this tile's: see `products`."""
    u = tl.sum(reading[:, :, None] * streams, 1).to(TYPE).to(tl.float32)
    r = tl.load(norms + local * 2, mask=live, other=0.0)[:, None]
    k = tl.load(norms + local * 2 + 1, mask=live, other=0.0)[:, None]
    gate = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    # du = r dout weight - k u, the rank-one correction; dweight += dout u r
    return r * gate * dout - k * u, dweights + dout * u * r


@triton.jit
@no_type_check
def _through_read(
    total, streams, dweights, grad_u, pre, weight, norms, local, live, c,
    n: tl.constexpr, C: tl.constexpr, TYPE,
):  # fmt: skip
    """Add `pre[i] du` to a tile [BT, P, BC]."""
    stream = tl.arange(0, total.shape[1])[None, :]
    real = live[:, None] & (stream < n)
    mask = live[:, None] & (c < C)[None, :]
    reading = tl.load(pre + local[:, None] * n + stream, mask=real, other=0.0)
    du = tl.load(grad_u + local[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
    if weight is not None:
        du, dweights = _through_norm(
            du, reading, streams, weight, norms, dweights, local, live, c, C, TYPE
        )  # fmt: skip
    return total + reading[:, :, None] * du[:, None, :], dweights


@triton.jit
@no_type_check
def _through_link(total, link, res, local, live, c, n: tl.constexpr, C: tl.constexpr):
    """Add `res^T link`, sum_o res[o, i] g[o], to a tile [BT, P, BC]."""
    stream = tl.arange(0, total.shape[1])[None, :]
    mask = live[:, None] & (c < C)[None, :]
    real = live[:, None] & (stream < n)
    # One offset for all o: the difference between them is then part of each load, not a register.
    places = local[:, None] * (n * n) + stream
    offsets = local[:, None] * (n * C) + c[None, :]
    for o in tl.static_range(n):
        # The compiler moves loads up as far as a barrier; without one it would hold too many.
        if n > 7 and o % 4 == 0:
            tl.debug_barrier()
        weights = tl.load(res + o * n + places, mask=real, other=0.0)
        back = tl.load(link + o * C + offsets, mask=mask, other=0.0)
        total += weights[:, :, None] * back.to(tl.float32)[:, None, :]
    return total


@triton.jit
@no_type_check
def _store_of_write(
    whole, y, post, dy, dposts, local, live, c, n: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """Store dy, and dpost's sums over the channels c, from the gradient of the streams."""
    stream = tl.arange(0, whole.shape[1])[None, :]
    real = live[:, None] & (stream < n)
    mask = live[:, None] & (c < C)[None, :]
    place = local[:, None] * C + c[None, :]
    gates = tl.load(post + local[:, None] * n + stream, mask=real, other=0.0)
    branch = tl.load(y + place, mask=mask, other=0.0).to(tl.float32)
    found = tl.sum(gates[:, :, None] * whole, 1)  # dy = sum_o post[o] dx[o]
    tl.store(dy + place, found.to(dy.dtype.element_ty), mask=mask)
    found = tl.sum(branch[:, None, :] * whole, 2)  # dpost[o] = <dx[o], y>
    tl.store(dposts + local[:, None] * n + stream, found, mask=real)


@triton.jit(do_not_specialize=["tokens", "span"])
@no_type_check
def streams_gradient_kernel(
    grad: tl.tensor, projected: tl.tensor, inverse_rms: tl.tensor, x: tl.tensor, phi: tl.tensor,
    grad_u: tl.tensor, pre: tl.tensor, weight: tl.tensor, norms: tl.tensor,
    link: tl.tensor, res: tl.tensor, outer: tl.tensor, y: tl.tensor, post: tl.tensor,
    dx: tl.tensor, dy: tl.tensor, dposts: tl.tensor, dphis: tl.tensor, dweights: tl.tensor,
    tokens: int, span: int,
    n: tl.constexpr, C: tl.constexpr, R: tl.constexpr, BT: tl.constexpr, P: tl.constexpr,
    BC: tl.constexpr, RB: tl.constexpr, ROW_BLOCKS: tl.constexpr, OWN: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Make dx, and partial sums of dphi, dpost and dweight.

    Matrix products take a tile as [BT, P BC], the rest as [BT, P, BC]. A program sums OWN of phi's
    ROW_BLOCKS blocks of RB rows; the first of those that share a tile makes dx.
    """
    split = tl.program_id(1)
    first_row = tl.program_id(2) * (OWN * RB)
    c0 = tl.program_id(0) * BC
    i = tl.arange(0, P)[None, :, None]
    c = c0 + tl.arange(0, BC)
    j = tl.arange(0, P * BC)
    r = first_row + tl.arange(0, RB)
    local = tl.arange(0, BT)
    places = (local * (n * C))[:, None] + (j // BC * C + c0 + j % BC)[None, :]
    inside = ((j // BC < n) & (c0 + j % BC < C))[None, :]
    first = split.to(tl.int64) * span
    grad += first * R
    projected += first * R
    inverse_rms += first
    x += first * (n * C)
    dx += first * (n * C)
    if grad_u is not None:
        grad_u += first * C
        pre += first * n
    if weight is not None:
        norms += first * 2
    if link is not None:
        link += first * (n * C)
        res += first * (n * n)
    if outer is not None:
        outer += first * (n * C)
    if y is not None:
        y += first * C
        post += first * n
        dy += first * C
        dposts += (tl.program_id(0).to(tl.int64) * tokens + first) * n
    weight_sums = tl.zeros([BT, BC], tl.float32)
    sums = ()
    weights = ()
    for b in tl.static_range(OWN):
        sums = sums + (tl.zeros([RB, P * BC], tl.float32),)
        if OWN == ROW_BLOCKS:
            weights = weights + (_phi_tile(phi, r + b * RB, j, BC, c0, n, C, R),)
    for start in tl.range(0, tl.minimum(span, tokens - first), BT, num_stages=STAGES):
        live = local < tokens - first - start
        streams = tl.load(x + places, mask=live[:, None] & inside, other=0.0)
        streams = streams.to(tl.float32)
        inverse = tl.load(inverse_rms + local, mask=live, other=0.0)
        added = ()
        scale = tl.zeros([BT], tl.float32)
        product = tl.zeros([BT, P * BC], tl.float32)
        for b in tl.static_range(OWN):
            real = live[:, None] & (r + b * RB < R)[None, :]
            offsets = local[:, None] * R + (r + b * RB)[None, :]
            dp = tl.load(grad + offsets, mask=real, other=0.0)
            dq = dp * inverse[:, None]
            # dphi += dq^T x
            added = added + (tl.dot(tl.trans(dq), streams, sums[b], input_precision=PRECISION),)
            if OWN == ROW_BLOCKS:
                # dq phi, and <dp, p>
                product = tl.dot(dq, weights[b], product, input_precision=PRECISION)
                scale += tl.sum(dp * tl.load(projected + offsets, mask=real, other=0.0), 1)
        sums = added
        if OWN == ROW_BLOCKS or first_row == 0:
            if OWN != ROW_BLOCKS:
                product, scale = _through_projections(
                    grad, projected, phi, inverse, local, live, j, c0,
                    n, C, R, BC, RB, ROW_BLOCKS, PRECISION,
                )  # fmt: skip
            huge = inverse < HUGE_INVERSE
            root = tl.where(huge, inverse * HUGE_ROOT, inverse)
            # Rank-one correction of the RMS norm: - <dp, p> / (rms^2 n C) x
            scale *= root * root / (n * C)
            back = streams * tl.where(huge, HUGE_SHARE, 1.0)[:, None]
            total = (product - scale[:, None] * back).reshape(BT, P, BC)
            if grad_u is not None:  # + pre[i] du
                total, weight_sums = _through_read(
                    total, streams.reshape(BT, P, BC), weight_sums, grad_u, pre, weight, norms,
                    local, live, c, n, C, x.dtype.element_ty,
                )  # fmt: skip
            if link is not None:  # + res^T link
                total = _through_link(total, link, res, local, live, c, n, C)
            targets = (local[:, None, None] * n + i) * C + c[None, None, :]
            mask = live[:, None, None] & (i < n) & (c < C)[None, None, :]
            if outer is not None:  # + dx'
                total += tl.load(outer + targets, mask=mask, other=0.0).to(tl.float32)
            whole = total.to(dx.dtype.element_ty)
            tl.store(dx + targets, whole, mask=mask)
            if y is not None:
                _store_of_write(
                    whole.to(tl.float32), y, post, dy, dposts, local, live, c, n, C
                )  # fmt: skip
        grad += BT * R
        projected += BT * R
        inverse_rms += BT
        x += BT * n * C
        dx += BT * n * C
        if grad_u is not None:
            grad_u += BT * C
            pre += BT * n
        if weight is not None:
            norms += BT * 2
        if link is not None:
            link += BT * n * C
            res += BT * n * n
        if outer is not None:
            outer += BT * n * C
        if y is not None:
            y += BT * C
            post += BT * n
            dy += BT * C
            dposts += BT * n
    columns = (j // BC * C + c0 + j % BC)[None, :]
    for b in tl.static_range(OWN):
        row = r[:, None] + b * RB
        offsets = (split.to(tl.int64) * R + row) * (n * C) + columns
        tl.store(dphis + offsets, sums[b], mask=(row < R) & inside)
    if weight is not None:
        place = dweights + split * C + c
        tl.store(place, tl.sum(weight_sums, 0), mask=tl.where(first_row == 0, c < C, False))


@triton.jit
@no_type_check
def _add_up(partial, out, block, count, size, BLOCK: tl.constexpr):
    """Store one block of the sum over `partial` [count, size], in its order."""
    offsets = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    row = partial + offsets
    for _ in range(count):
        total += tl.load(row, mask=offsets < size, other=0.0)
        row += size
    tl.store(out + offsets, total.to(out.dtype.element_ty), mask=offsets < size)


@triton.jit(do_not_specialize=["splits", "gate_blocks", "mix_blocks", "chunks", "gates"])
@no_type_check
def summed_kernel(
    dphis: tl.tensor, sums: tl.tensor, dweights: tl.tensor, dposts: tl.tensor,
    dphi: tl.tensor, dalpha: tl.tensor, dbias: tl.tensor, dweight: tl.tensor, dpost: tl.tensor,
    splits: int, gate_blocks: int, mix_blocks: int, chunks: int, gates: int,
    n: tl.constexpr, R: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up partial sums: of phi, each bias and alpha, WIDTH weights, and `gates` posts.

    `sums` holds one row for each of pre | post | alpha_pre, alpha_post over the gate blocks,
    then for res | alpha_res over the mix blocks.
    """
    program = tl.program_id(0)
    PHI_BLOCKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    COLUMNS: tl.constexpr = 0 if sums is None else R + 3
    WEIGHT_BLOCKS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    lane = tl.arange(0, BLOCK)
    if program < PHI_BLOCKS:
        _add_up(dphis, dphi, program, splits, SIZE, BLOCK)
    elif program < PHI_BLOCKS + COLUMNS:
        if sums is not None:
            GATES: tl.constexpr = 2 * n + 2
            column = program - PHI_BLOCKS
            of_gates = column < GATES
            length = tl.where(of_gates, gate_blocks, mix_blocks)
            skipped = tl.where(of_gates, 0, GATES * gate_blocks.to(tl.int64))
            row = skipped + tl.where(of_gates, column, column - GATES).to(tl.int64) * length
            parts = tl.zeros([BLOCK], tl.float32)
            for start in range(0, length, BLOCK):
                parts += tl.load(sums + row + start + lane, mask=start + lane < length, other=0.0)
            found = tl.sum(parts, 0)
            is_bias = (column < 2 * n) | ((column >= GATES) & (column < R + 2))
            place = tl.where(of_gates, column, column - 2)
            tl.store(dbias + place, found, mask=is_bias)
            tl.store(dalpha + tl.where(of_gates, column - 2 * n, 2), found, mask=is_bias == 0)
    elif program < PHI_BLOCKS + COLUMNS + WEIGHT_BLOCKS:
        if dweights is not None:
            _add_up(dweights, dweight, program - PHI_BLOCKS - COLUMNS, splits, WIDTH, BLOCK)
    elif dposts is not None:
        block = program - PHI_BLOCKS - COLUMNS - WEIGHT_BLOCKS
        _add_up(dposts, dpost, block, chunks, gates, BLOCK)


def of_streams(
    grad: Tensor, projected: Tensor, inverse_rms: Tensor, x: Tensor, phi: Tensor,
    mixed: Mixed, write: Write | None,
) -> Pieces:  # fmt: skip
    """Return dx [N, n, C], and partial sums of dphi [splits, R, nC] and dweight [splits, C].

    grad [N, R]: dp. With `write` also dy and the partial sums of dpost [chunks, N, n].
    """
    tokens, n, C = x.shape
    R = phi.shape[0]
    tile = plan.gradient_tile(n, C, R, x.dtype, mixed.weight is not None)
    chunks = plan.blocks(C, tile["BC"])
    splits = plan.token_splits(tokens, tile["BT"], chunks)
    span = plan.blocks(plan.blocks(tokens, splits), tile["BT"]) * tile["BT"]
    outer, y, post = write or (None, None, None)
    pieces = Pieces(
        torch.empty_like(x),
        None if y is None else torch.empty_like(y),
        None if y is None else phi.new_empty(chunks, tokens, n),
        phi.new_empty(splits, *phi.shape),
        None if mixed.weight is None else phi.new_empty(splits, C),
    )
    if not tokens:
        for sums in (pieces.phis, pieces.weights):
            if sums is not None:
                sums.zero_()
        return pieces
    with plan.launching(x):
        streams_gradient_kernel[(chunks, splits, plan.blocks(tile["ROW_BLOCKS"], tile["OWN"]))](
            grad, projected, inverse_rms, x, phi,
            *mixed, outer, y, post, *pieces, tokens, span,
            n=n, C=C, R=R, P=plan.power_of_two(n), PRECISION=plan.precision(x.dtype), **tile,
        )  # fmt: skip
    return pieces


def summed(phi: Tensor, partial: Tensor) -> Tensor:
    """Return dphi, the sum of its partial sums."""
    if len(partial) == 1:
        return partial.squeeze(0)
    dphi = torch.empty_like(phi)
    with plan.launching(phi):
        summed_kernel[(plan.blocks(phi.numel(), plan.SUM_BLOCK),)](
            partial, None, None, None, dphi, None, None, None, None, len(partial), 0, 0, 0, 0,
            n=1, R=phi.shape[0], SIZE=phi.numel(), WIDTH=0, BLOCK=plan.SUM_BLOCK,
        )  # fmt: skip
    return dphi


def summed_with_gates(
    pieces: Pieces, sums: Tensor, gate_blocks: int, mix_blocks: int,
    maps: MapParameters, weight: Tensor | None, dpre: Tensor | None,
) -> BoundaryGradients:  # fmt: skip
    """Return all gradients: partial sums of the pass over the streams and the gates added up."""
    phi, alpha, bias = maps
    tokens, n, C = pieces.x.shape
    none = phi.new_empty(0)
    dphi, dalpha, dbias = map(torch.empty_like, (phi, alpha, bias))
    dweight = none if weight is None else torch.zeros_like(weight)
    posts = pieces.posts
    dpost, gates = (none, 0) if posts is None else (phi.new_empty(tokens, n), tokens * n)
    width = 0 if pieces.weights is None else C
    columns = phi.shape[0] + 3
    with plan.launching(phi):
        launch = sum(plan.blocks(size, plan.SUM_BLOCK) for size in (phi.numel(), width, gates))
        summed_kernel[(launch + columns,)](
            pieces.phis, sums, pieces.weights, posts, dphi, dalpha, dbias, dweight, dpost,
            len(pieces.phis), gate_blocks, mix_blocks, 0 if posts is None else len(posts), gates,
            n=n, R=phi.shape[0], SIZE=phi.numel(), WIDTH=width, BLOCK=plan.SUM_BLOCK,
        )  # fmt: skip
    dy = none if pieces.y is None else pieces.y
    dpre = none if dpre is None else dpre
    return BoundaryGradients(pieces.x, dy, dpost, dpre, dphi, dalpha, dbias, dweight)
