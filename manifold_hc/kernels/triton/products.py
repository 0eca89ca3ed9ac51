"""Inner products of the streams, token by token, in the first read of the backward pass.

With the gradient du of the input u, `<du, x[i]>` is the gradient of the read weights; with the
gradient g of the streams that the next write makes, `<g[o], x[i]>` is that of res. With a norm,

    u = sum_i w[i] x[i]      out = u r weight      r = 1 / rms(u)      h = dout weight
    du = r h - k u           k = r^3 <h, u> / C

du needs r and k, so the sums are `<h, x[i]>` and `<u, x[i]>`.
"""

from typing import no_type_check

import triton
import triton.language as tl

from manifold_hc.kernels.triton.read import plus, products, zeros_of


@triton.jit
@no_type_check
def link_and_read(
    grad_u, link, x, weight, reading, mixed, token, live, first,
    n: tl.constexpr, C: tl.constexpr, L: tl.constexpr, V: tl.constexpr,
    ROWS: tl.constexpr, READS: tl.constexpr,
):  # fmt: skip
    """Pass once over the channels; any of grad_u, link and weight may be None.

    Store the products with ROWS streams of link, from `first` on, in mixed [N, n, n]. With READS
    return the products with grad_u, n vectors [BT]; with a weight `<h, x[i]>`, `<h, u>`,
    `<u, x[i]>` and `<u, u>`, u being read again with the n vectors `reading`.
    """
    BT: tl.constexpr = token.shape[0]
    COUNT: tl.constexpr = n if weight is None else 2 * (n + 1)
    row = token[:, None, None]
    lanes = tl.arange(0, L)[None, :, None] * V + tl.arange(0, V)[None, None, :]
    of_link = zeros_of(ROWS * n, BT, L)
    of_read = zeros_of(COUNT, BT, L)
    for start in range(0, C, L * V):
        c = start + lanes
        mask = live[:, None, None] & (c < C)
        streams = ()
        for i in tl.static_range(n):
            place = x + (row * n + i) * C + c
            streams = streams + (tl.load(place, mask=mask, other=0.0).to(tl.float32),)
        if link is not None:
            back = ()
            for o in tl.static_range(ROWS):
                place = link + (row * n + first + o) * C + c
                back = back + (tl.load(place, mask=mask, other=0.0).to(tl.float32),)
            of_link = products(of_link, back, streams)  # dres[o, i] = <g[o], x[i]>
        if READS:
            h = tl.load(grad_u + row * C + c, mask=mask, other=0.0).to(tl.float32)
            if weight is None:
                of_read = products(of_read, (h,), streams)  # dpre[i] = <du, x[i]>
            else:
                h *= tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
                # h = dout weight, and u = sum_i w[i] x[i] rounded as in memory
                u = tl.zeros([BT, L, V], tl.float32)
                for i in tl.static_range(n):
                    u = plus(u, reading[i][:, None, None], streams[i])
                u = u.to(x.dtype.element_ty).to(tl.float32)
                of_read = products(of_read, (h, u), streams + (u,))
    if link is not None:
        for k in tl.static_range(ROWS * n):
            place = mixed + token * (n * n) + first * n + k
            tl.store(place, tl.sum(of_link[k], 1), mask=live)
    found = ()
    if READS:
        for k in tl.static_range(COUNT):
            found = found + (tl.sum(of_read[k], 1),)
    return found


@triton.jit
@no_type_check
def through_norm(found, norms, token, live, input_eps: float, n: tl.constexpr, C: tl.constexpr):
    """Return `<du, x[i]>`, n vectors, from the sums of `link_and_read` with a weight.

    Store r and k in norms [N, 2].
    """
    # r = 1 / rms(u), k = r^3 <h, u> / C
    r = tl.rsqrt(found[2 * n + 1] / C + input_eps)
    k = r * r * r * found[n] / C
    tl.store(norms + token * 2, r, mask=live)
    tl.store(norms + token * 2 + 1, k, mask=live)
    # <du, x[i]> = r <h, x[i]> - k <u, x[i]>
    inner = ()
    for i in tl.static_range(n):
        inner = inner + (r * found[i] - k * found[n + 1 + i],)
    return inner
