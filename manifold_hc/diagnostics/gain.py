"""Amax gain magnitude and other figures of mixing matrices (arXiv 2512.24880, section 5.4)."""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from manifold_hc.errors import ConfigError, ShapeError

Average = Literal["gains", "matrices"]


class AmaxGain(NamedTuple):
    """Gain magnitudes of L sublayers in depth order, each [L], float64."""

    forward: Float[Tensor, " L"]
    """Largest |row sum| of each matrix: bound on the growth of a signal."""
    backward: Float[Tensor, " L"]
    """Largest |column sum| of each matrix: bound on the growth of a gradient."""
    composite_forward: Float[Tensor, " L"]
    """Largest |row sum| of `res_{L-1} ... res_l`, from sublayer l to the exit."""
    composite_backward: Float[Tensor, " L"]
    """Largest |column sum| of `res_{L-1} ... res_l`."""


def amax_gain(
    matrices: Float[Tensor, "L n n"] | Float[Tensor, "L tokens n n"], average: Average = "gains"
) -> AmaxGain:
    """Compute single and composite gains of mixing matrices `res[o, i]`.

    Row and column sums are signed, so entries of opposite sign cancel.

    Args:
        matrices: [L, n, n] or [L, tokens, n, n], floating point, in depth order.
        average: over tokens. "gains" is the mean of the tokens' gains, "matrices" the gain of the
            mean matrix. Composites are multiplied for each token before either average. The paper
            does not say which average it shows.

    Returns:
        Forward and backward gain of every matrix and of every composite, each [L] float64.

    Raises:
        ShapeError: for matrices of another shape, or none.
        ConfigError: for another `average`.

    Example:
        >>> import torch
        >>> from manifold_hc.diagnostics import amax_gain
        >>> doubling = 2 * torch.eye(4).expand(3, 4, 4)  # three sublayers, four streams
        >>> gain = amax_gain(doubling)
        >>> gain.forward.tolist(), gain.composite_forward.tolist()
        ([2.0, 2.0, 2.0], [8.0, 4.0, 2.0])
    """
    if average not in ("gains", "matrices"):
        raise ConfigError(f"amax_gain: average must be gains or matrices but is {average!r}")
    single = _with_tokens(matrices)
    composite = composites(single)
    if average == "matrices":
        single, composite = single.mean(1, keepdim=True), composite.mean(1, keepdim=True)
    return AmaxGain(
        forward=_row_gain(single).mean(1),
        backward=_column_gain(single).mean(1),
        composite_forward=_row_gain(composite).mean(1),
        composite_backward=_column_gain(composite).mean(1),
    )


def composites(
    matrices: Float[Tensor, "L n n"] | Float[Tensor, "L tokens n n"],
) -> Float[Tensor, "..."]:
    """Multiply the matrices from every sublayer to the exit: `res_{L-1} ... res_l` for every l.

    Args:
        matrices: [L, n, n] or [L, tokens, n, n], in depth order.

    Returns:
        The products, float64, in the shape of `matrices`.

    Example:
        >>> import torch
        >>> from manifold_hc.diagnostics import composites
        >>> composites(torch.tensor([[[2.0]], [[3.0]]])).flatten().tolist()
        [6.0, 3.0]
    """
    products = list(matrices.double())
    for depth in reversed(range(len(products) - 1)):
        products[depth] = products[depth + 1] @ products[depth]
    return torch.stack(products)


def log_column_sum(
    matrices: Float[Tensor, "L n n"] | Float[Tensor, "L tokens n n"],
) -> Float[Tensor, " L"]:
    """Compute the largest |log |column sum|| of each matrix, mean over tokens.

    0 if every column sum is 1 or -1; attenuation and growth by the same factor give the same value.

    Args:
        matrices: [L, n, n] or [L, tokens, n, n].

    Returns:
        [L] float64.

    Raises:
        ShapeError: for matrices of another shape, or none.

    Example:
        >>> import torch
        >>> from manifold_hc.diagnostics import log_column_sum
        >>> round(log_column_sum(0.5 * torch.eye(2)[None]).item(), 4)
        0.6931
    """
    sums = _with_tokens(matrices).sum(-2).abs()
    return sums.log().abs().amax(-1).mean(1)


def stochastic_distance(
    matrices: Float[Tensor, "L n n"] | Float[Tensor, "L tokens n n"],
) -> Float[Tensor, " L"]:
    """Compute the distance of each matrix from doubly stochastic, mean over tokens.

    The distance is the largest of |row sum - 1|, |column sum - 1| and -entry; 0 for a doubly
    stochastic matrix.

    Args:
        matrices: [L, n, n] or [L, tokens, n, n].

    Returns:
        [L] float64.

    Raises:
        ShapeError: for matrices of another shape, or none.

    Example:
        >>> import torch
        >>> from manifold_hc.diagnostics import stochastic_distance
        >>> stochastic_distance(torch.stack([torch.eye(2), 3 * torch.eye(2)])).tolist()
        [0.0, 2.0]
    """
    m = _with_tokens(matrices)
    rows, columns = ((m.sum(axis) - 1).abs().amax(-1) for axis in (-1, -2))
    negative = (-m).clamp_min(0).amax((-1, -2))
    return torch.stack([rows, columns, negative]).amax(0).mean(1)


def _with_tokens(matrices: Tensor) -> Float[Tensor, "L tokens n n"]:
    """Convert to float64, with one token if there is no token dimension; check the shape."""
    if matrices.dim() not in (3, 4) or matrices.shape[-1] != matrices.shape[-2]:
        raise ShapeError(
            "amax_gain: matrices must be [L, n, n] or [L, tokens, n, n] "
            f"but are {list(matrices.shape)}; flatten batch and time to tokens"
        )
    if not matrices.numel():
        raise ShapeError(f"amax_gain: matrices are empty: {list(matrices.shape)}")
    return matrices.double() if matrices.dim() == 4 else matrices.double().unsqueeze(1)


def _row_gain(matrices: Float[Tensor, "L tokens n n"]) -> Float[Tensor, "L tokens"]:
    """Compute max_o |sum_i res[o, i]|."""
    return matrices.sum(-1).abs().amax(-1)


def _column_gain(matrices: Float[Tensor, "L tokens n n"]) -> Float[Tensor, "L tokens"]:
    """Compute max_i |sum_o res[o, i]|."""
    return matrices.sum(-2).abs().amax(-1)
