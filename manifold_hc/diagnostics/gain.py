"""Amax gain magnitude and the other figures of mixing matrices (arXiv 2512.24880, section 5.4)."""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from manifold_hc.errors import ConfigError, ShapeError

Average = Literal["gains", "matrices"]


class AmaxGain(NamedTuple):
    """Gain magnitudes of L sublayers in depth order, each [L], float64.

    Entry l of a composite is the gain of `res_{L-1} ... res_l`: from sublayer l to the exit.
    """

    forward: Float[Tensor, " L"]
    """Largest |row sum| of each matrix: how much a signal can grow."""
    backward: Float[Tensor, " L"]
    """Largest |column sum| of each matrix: how much a gradient can grow."""
    composite_forward: Float[Tensor, " L"]
    composite_backward: Float[Tensor, " L"]


def amax_gain(
    matrices: Float[Tensor, "L n n"] | Float[Tensor, "L tokens n n"], average: Average = "gains"
) -> AmaxGain:
    """Single and composite gains of mixing matrices `res[o, i]` in depth order.

    matrices: [L, n, n] or [L, tokens, n, n]. Sums are signed, so cancellation counts. With tokens,
    average="gains" takes the mean over tokens of each token's gain, average="matrices" the gain of
    the mean matrix; the composite is always multiplied token by token first. The paper does not
    say which it shows. Raises ShapeError, and ConfigError for another average.
    """
    if average not in ("gains", "matrices"):
        raise ConfigError(f"amax_gain: average must be gains or matrices but is {average!r}")
    single = _tokenwise(matrices)
    composite = composites(single)
    if average == "matrices":
        single, composite = single.mean(1, keepdim=True), composite.mean(1, keepdim=True)
    return AmaxGain(*(g.mean(1) for m in (single, composite) for g in (_rows(m), _columns(m))))


def composites(
    matrices: Float[Tensor, "L n n"] | Float[Tensor, "L tokens n n"],
) -> Float[Tensor, "..."]:
    """The products `res_{L-1} ... res_l` for every l, in float64 and the shape of `matrices`."""
    products = list(matrices.double())
    for depth in reversed(range(len(products) - 1)):
        products[depth] = products[depth + 1] @ products[depth]
    return torch.stack(products)


def log_column_sum(
    matrices: Float[Tensor, "L n n"] | Float[Tensor, "L tokens n n"],
) -> Float[Tensor, " L"]:
    """Largest |log |column sum|| of each matrix, mean over tokens: attenuation counts too."""
    sums = _tokenwise(matrices).sum(-2).abs()
    return sums.log().abs().amax(-1).mean(1)


def stochastic_distance(
    matrices: Float[Tensor, "L n n"] | Float[Tensor, "L tokens n n"],
) -> Float[Tensor, " L"]:
    """How far each matrix is from doubly stochastic, mean over tokens; 0 if it is.

    The largest of |row sum - 1|, |column sum - 1| and the size of a negative entry.
    """
    m = _tokenwise(matrices)
    worst = [(m.sum(axis) - 1).abs().amax(-1) for axis in (-1, -2)]
    return torch.stack([*worst, (-m).clamp_min(0).amax((-1, -2))]).amax(0).mean(1)


def _tokenwise(matrices: Tensor) -> Float[Tensor, "L tokens n n"]:
    if matrices.dim() not in (3, 4) or matrices.shape[-1] != matrices.shape[-2]:
        raise ShapeError(
            "amax_gain: matrices must be [L, n, n] or [L, tokens, n, n] "
            f"but are {list(matrices.shape)}; flatten batch and time to tokens"
        )
    if not matrices.numel():
        raise ShapeError(f"amax_gain: matrices are empty: {list(matrices.shape)}")
    return matrices.double() if matrices.dim() == 4 else matrices.double().unsqueeze(1)


def _rows(matrices: Float[Tensor, "L tokens n n"]) -> Float[Tensor, "L tokens"]:
    return matrices.sum(-1).abs().amax(-1)


def _columns(matrices: Float[Tensor, "L tokens n n"]) -> Float[Tensor, "L tokens"]:
    return matrices.sum(-2).abs().amax(-1)
