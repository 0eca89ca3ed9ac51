"""Family of mHC conventions: every detail in which published implementations differ, as a field.

A second statement of the equations, in plain torch and independent of `manifold_hc.reference`:
`mhc verify --checkpoint` judges both sides by it. Sources: arXiv 2512.24880, equations 7 to 9
(paper); arXiv 2606.19348 and its released code (deepseek_v4).
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from manifold_hc.config import ConnectionConfig
from manifold_hc.numerics import preset

Direction = Literal["transposed", "as stored"]

Last = Literal["rows", "columns"]


class Weights(NamedTuple):
    """Parameters of one sublayer's maps (R = 2n + n*n rows, 3 gates), or of the exit (n, 1)."""

    phi: Float[Tensor, "R nC"]
    alpha: Float[Tensor, " gates"]
    bias: Float[Tensor, " R"]


class Projection(NamedTuple):
    """Part of the maps that no convention changes: computed once a sublayer."""

    raw: Float[Tensor, "N R"]
    """`vec(x) phi^T`, before the norm."""
    mean_square: Float[Tensor, "N 1"]
    """Mean over the nC squared values of a token."""


class Maps(NamedTuple):
    """Coefficients of one sublayer."""

    pre: Float[Tensor, "N n"]
    post: Float[Tensor, "N n"]
    res: Float[Tensor, "N n n"]


@dataclass(frozen=True)
class Convention:
    """One choice of every detail. `comb` is the matrix as its n*n rows are stored, row-major."""

    direction: Direction
    """Direction of the mixing: res[o, i] = comb[i, o], or res[o, i] = comb[o, i]."""
    last: Last
    """Sums of comb that the last Sinkhorn step normalises."""
    norm_eps: float
    """Epsilon of the RMS norm over the nC stream values."""
    norm_place: Literal["inside", "outside"]
    """Inside: 1 / sqrt(mean + eps). Outside: 1 / (sqrt(mean) + eps)."""
    start: Literal["softmax", "exp"]
    """First Sinkhorn step: an exact softmax, or exp and a division like all others."""
    start_eps: float
    """Epsilon added to comb after the softmax."""
    denominator_eps: float
    """Epsilon in the Sinkhorn denominators."""
    pre_eps: float
    """Epsilon added to pre, and to the weights of a learned exit."""
    post_factor: float
    """Factor of the sigmoid in post."""
    iterations: int
    """Sinkhorn iterations; an iteration normalises rows and columns."""
    exit: Literal["mean", "sum", "learned", "pre"]
    """Reduction of the streams after the last sublayer."""

    def maps(self, projection: Projection, weights: Weights) -> Maps:
        """Compute the coefficients of one sublayer."""
        n = _streams(weights)
        logits = self._normalised(projection)
        pre, post, res = logits.tensor_split((n, 2 * n), -1)
        pre_bias, post_bias, res_bias = weights.bias.tensor_split((n, 2 * n))
        comb = (weights.alpha[2] * res + res_bias).unflatten(-1, (n, n))
        comb = self._sinkhorn(comb)
        return Maps(
            (weights.alpha[0] * pre + pre_bias).sigmoid() + self.pre_eps,
            self.post_factor * (weights.alpha[1] * post + post_bias).sigmoid(),
            comb.mT if self.direction == "transposed" else comb,
        )

    def exit_weights(self, projection: Projection, weights: Weights) -> Float[Tensor, "N n"]:
        """Compute the weights of a learned exit."""
        logits = weights.alpha * self._normalised(projection) + weights.bias
        return logits.sigmoid() + self.pre_eps

    def _normalised(self, projection: Projection) -> Float[Tensor, "N R"]:
        if self.norm_place == "inside":
            return projection.raw * (projection.mean_square + self.norm_eps).rsqrt()
        return projection.raw / (projection.mean_square.sqrt() + self.norm_eps)

    def _sinkhorn(self, logits: Float[Tensor, "N n n"]) -> Float[Tensor, "N n n"]:
        first, last = (-1, -2) if self.last == "columns" else (-2, -1)
        eps = self.denominator_eps
        if self.start == "softmax":
            comb = logits.softmax(first) + self.start_eps
        else:
            # The first division cancels the shift if its denominator has no epsilon.
            comb = (logits - (0.0 if eps else logits.amax(first, keepdim=True))).exp()
        for step in range(self.iterations):
            if step or self.start == "exp":
                comb = comb / (comb.sum(first, keepdim=True) + eps)
            comb = comb / (comb.sum(last, keepdim=True) + eps)
        return comb


def project(x: Float[Tensor, "N n C"], weights: Weights) -> Projection:
    """Compute the part of the maps that all conventions share."""
    v = x.flatten(-2)
    return Projection(v @ weights.phi.mT, v.square().mean(-1, keepdim=True))


def read(x: Float[Tensor, "N n C"], pre: Float[Tensor, "N n"]) -> Float[Tensor, "N C"]:
    """Input of the sublayer, or the exit with these weights."""
    return torch.einsum("ti,tic->tc", pre, x)


def write(
    x: Float[Tensor, "N n C"],
    y: Float[Tensor, "N C"],
    post: Float[Tensor, "N n"],
    res: Float[Tensor, "N n n"],
) -> Float[Tensor, "N n C"]:
    """Streams after the sublayer, whose branch returned y."""
    return torch.einsum("toi,tic->toc", res, x) + torch.einsum("to,tc->toc", post, y)


def of(config: ConnectionConfig) -> Convention | None:
    """Return the convention of a configuration; None where the family has none.

    The family has dynamic mHC with a Sinkhorn matrix and nothing disabled.
    """
    known = config.constraint in ("sinkhorn", "sinkhorn_columns")
    if config.kind != "mhc" or not config.dynamic or config.disable or not known:
        return None
    numerics = preset(config.numerics, norm_eps=config.norm_eps, hc_eps=config.hc_eps)
    columns_last = numerics.res_is_transposed != (config.constraint == "sinkhorn_columns")
    return Convention(
        direction="transposed" if numerics.res_is_transposed else "as stored",
        last="columns" if columns_last else "rows",
        norm_eps=numerics.norm_eps,
        norm_place="inside",
        start="softmax",
        start_eps=numerics.hc_eps,
        denominator_eps=numerics.hc_eps,
        pre_eps=numerics.hc_eps,
        post_factor=2.0,
        iterations=config.iterations,
        exit=config.exit_rule,
    )


def _streams(weights: Weights) -> int:
    """Number n of streams from R = n*n + 2n rows."""
    return round((1 + len(weights.bias)) ** 0.5) - 1
