"""The connections in plain torch: the specification of every backend.

Shape legend, used throughout the package:

    B batch   T time   n streams   C channels   L sublayers   k logits of `res` a token
    o output stream   i input stream
    x    [*batch, n, C]   streams            u, y [*batch, C]   a sublayer's input and output
    pre  [*batch, n]      read weights       post [*batch, n]   write weights
    res  [*batch, o, i]   mixing matrix: row = output stream, column = input stream

Coefficients are computed in float32, or float64 where an input is float64; `read`, `write` and
`collapse` accumulate in the coefficients' dtype and return the streams' dtype.
Sources: mHC = arXiv 2512.24880, HC = arXiv 2409.19606, DeepSeek-V4 = arXiv 2606.19348.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from manifold_hc.constraints import CONSTRAINTS
from manifold_hc.numerics import Numerics

Coefficients = tuple[
    Float[Tensor, "*batch n"], Float[Tensor, "*batch n"], Float[Tensor, "*batch o i"]
]


def expand(h: Float[Tensor, "*batch C"], n: int) -> Float[Tensor, "*batch n C"]:
    """Entry of the network: copy `h` to n streams."""
    return h.unsqueeze(-2).expand(*h.shape[:-1], n, h.shape[-1]).contiguous()


def project(
    x: Float[Tensor, "*batch n C"], phi: Float[Tensor, "rows nC"], norm_eps: float
) -> Float[Tensor, "*batch rows"]:
    """`RMSNorm(vec(x)) phi^T`, the division after the product (mHC, section 4.3).

    A token whose squares overflow, in float32 from an RMS of 1e17 on, gives NaN: dividing by
    infinity would make its maps static without an error. The kernels compute it scaled.
    """
    v = x.flatten(-2).to(_accumulation(x, phi))
    mean = v.square().mean(-1, keepdim=True)
    inverse_rms = (mean.masked_fill(mean.isinf(), math.nan) + norm_eps).rsqrt()
    return (v @ phi.to(v.dtype).mT) * inverse_rms


def coefficients(
    x: Float[Tensor, "*batch n C"],
    phi: Float[Tensor, "rows nC"] | None,
    alpha: Float[Tensor, "3"] | None,
    bias: Float[Tensor, " rows"],
    iterations: int,
    constraint: str,
    numerics: Numerics,
) -> Coefficients:
    """Compute mHC's maps (mHC, equations 7 and 8); without `phi` and `alpha` the static ones.

    Rows of `phi` and `bias`: pre (n) | post (n) | res (k).
    """
    n = x.shape[-2]
    if phi is None or alpha is None:
        logits = bias.to(_accumulation(x, bias)).expand(*x.shape[:-2], -1)
    else:
        logits = gate(project(x, phi, numerics.norm_eps), alpha, bias, n)
    pre, post, res = activate(logits, n, numerics)
    return pre, post, CONSTRAINTS[constraint].build(res, n, iterations, numerics)


def normalise(
    u: Float[Tensor, "*batch C"], weight: Float[Tensor, " C"], eps: float
) -> Float[Tensor, "*batch C"]:
    """RMS norm over C (arXiv 1910.07467), in u's dtype."""
    wide = u.to(_accumulation(u, weight))
    inverse_rms = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (wide * inverse_rms * weight).to(u.dtype)


def gate(
    projected: Float[Tensor, "*batch rows"],
    alpha: Float[Tensor, "3"],
    bias: Float[Tensor, " rows"],
    n: int,
) -> Float[Tensor, "*batch rows"]:
    """Return the logits: projections times their group's gate (pre, post, res), plus the bias."""
    sizes = (n, n, bias.shape[0] - 2 * n)
    gates = torch.cat([gate.expand(size) for gate, size in zip(alpha, sizes, strict=True)])
    return projected * gates + bias


def activate(
    logits: Float[Tensor, "*batch rows"], n: int, numerics: Numerics
) -> tuple[Float[Tensor, "*batch n"], Float[Tensor, "*batch n"], Float[Tensor, "*batch k"]]:
    """Return pre and post from their logits, and the logits of res unchanged."""
    pre, post, res = logits.tensor_split((n, 2 * n), -1)
    return pre.sigmoid() + numerics.hc_eps, 2 * post.sigmoid(), res


def hc_coefficients(
    x: Float[Tensor, "*batch n C"],
    phi: Float[Tensor, "rows C"] | None,
    alpha: Float[Tensor, "3"] | None,
    bias: Float[Tensor, " static"],
    norm_eps: float,
) -> Coefficients:
    """Compute HC's maps (HC, equations 10 to 13); without `phi` and `alpha` the static ones.

    Each stream's own C values give that stream's row of coefficients through tanh. Rows of `phi`:
    pre (1) | post (1) | res (n, one per output stream); entries of `bias`: pre (n) | post (n) |
    res (n*n, row-major [o, i], the transpose of the paper's `A_r`).
    """
    static = bias.to(_accumulation(x, bias)).expand(*x.shape[:-2], -1)
    if phi is None or alpha is None:
        return hc_move(static, x.shape[-2])
    # Each stream is normalised over C and projected as mHC does with n = 1.
    return hc_move(static, x.shape[-2], project(x.unsqueeze(-2), phi, norm_eps), alpha)


def hc_move(
    static: Float[Tensor, "*batch static"],
    n: int,
    projected: Float[Tensor, "*batch n rows"] | None = None,
    alpha: Float[Tensor, "3"] | None = None,
) -> Coefficients:
    """Return HC's static maps plus alpha * tanh(projections) of every stream (pre | post | res)."""
    pre, post, res = static.tensor_split((n, 2 * n), -1)
    res = res.unflatten(-1, (n, n))
    if projected is None or alpha is None:
        return pre, post, res
    moves = projected.tanh()  # [*batch, i, 1 | 1 | o]
    return (
        pre + alpha[0] * moves[..., 0],
        post + alpha[1] * moves[..., 1],
        res + alpha[2] * moves[..., 2:].mT,
    )


def exit_coefficients(
    x: Float[Tensor, "*batch n C"],
    phi: Float[Tensor, "n nC"],
    alpha: Float[Tensor, "1"],
    bias: Float[Tensor, " n"],
    numerics: Numerics,
) -> Float[Tensor, "*batch n"]:
    """DeepSeek-V4's learned exit (`hc_head`): the weights `collapse` sums the streams with."""
    logits = project(x, phi, numerics.norm_eps) * alpha + bias
    return logits.sigmoid() + numerics.hc_eps


def read(
    x: Float[Tensor, "*batch n C"], pre: Float[Tensor, "*#batch n"]
) -> Float[Tensor, "*batch C"]:
    """A sublayer's input `u = sum_i pre[i] x[i]`."""
    return (pre.unsqueeze(-1) * x).sum(-2).to(x.dtype)


def write(
    x: Float[Tensor, "*batch n C"],
    y: Float[Tensor, "*batch C"],
    post: Float[Tensor, "*#batch n"],
    res: Float[Tensor, "*#batch n n"],
) -> Float[Tensor, "*batch n C"]:
    """The next streams `x'[o] = sum_i res[o, i] x[i] + post[o] y`."""
    mixed = res @ x.to(_accumulation(x, res))
    return (mixed + post.unsqueeze(-1) * y.unsqueeze(-2)).to(x.dtype)


def collapse(
    x: Float[Tensor, "*batch n C"], weights: Float[Tensor, "*#batch n"] | None = None
) -> Float[Tensor, "*batch C"]:
    """Exit of the network: the mean of the streams, or their sum weighted by `weights`."""
    return x.mean(-2) if weights is None else read(x, weights)


def _accumulation(x: Tensor, coefficient: Tensor) -> torch.dtype:
    """Return float32, or float64 where either tensor is float64."""
    return torch.promote_types(torch.promote_types(x.dtype, coefficient.dtype), torch.float32)
