"""Values that travel together between functions, operators and kernels.

Only the schema of a torch operator spells their fields out, because PyTorch takes tensors and
numbers alone.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from manifold_hc.constraints import CONSTRAINTS
from manifold_hc.numerics import Numerics


class MapParameters(NamedTuple):
    """Parameters of a sublayer's dynamic maps: R rows, pre | post | res."""

    phi: Tensor
    """[R, nC]"""
    alpha: Tensor
    """[3]: gates of pre, post and res."""
    bias: Tensor
    """[R]"""


def fused_maps(
    phi: Tensor | None, alpha: Tensor | None, bias: Tensor, constraint: str
) -> MapParameters | None:
    """Map parameters that one kernel takes; None for static maps, or where torch builds res."""
    if phi is None or alpha is None or not CONSTRAINTS[constraint].in_kernels:
        return None
    return MapParameters(phi, alpha, bias)


class Settings(NamedTuple):
    """Options of the operators that compute coefficients."""

    constraint: str
    iterations: int
    transposed: bool
    """True if the n*n rows are DeepSeek-V4's `comb[source, target]`, in its order of steps."""
    norm_eps: float
    hc_eps: float
    learns: bool
    """True if res is trained: the gradient through the link is a gradient of res too."""


def settings_of(
    numerics: Numerics, iterations: int, constraint: str, learns: bool = True
) -> Settings:
    """Numbers of one call, from its preset and arguments."""
    return Settings(
        constraint=constraint,
        iterations=iterations,
        transposed=numerics.res_is_transposed,
        norm_eps=numerics.norm_eps,
        hc_eps=numerics.hc_eps,
        learns=learns,
    )


class InputNorm(NamedTuple):
    """RMS norm of a sublayer's input."""

    weight: Float[Tensor, " C"]
    eps: float
    """Epsilon inside the root."""


class BackwardLink(NamedTuple):
    """Link from a write to the coefficients of its streams, so that both share a backward pass.

    Opaque. It holds for these streams and this `res`, whose gradients come through it; a write of
    other streams ignores it.
    """

    grad_carrier: Float[Tensor, "*tokens n C"]
    x: Float[Tensor, "*batch n C"]
    res: Float[Tensor, "*batch o i"]


class Reading(NamedTuple):
    """Coefficients of a sublayer, and the input that it reads with them."""

    pre: Float[Tensor, "*batch n"]
    post: Float[Tensor, "*batch n"]
    res: Float[Tensor, "*batch o i"]
    u: Float[Tensor, "*batch C"]
    """Input of the sublayer, after `input_norm` where that was given."""
    x: Float[Tensor, "*batch n C"]
    """Streams that were read."""
    read_weights: Float[Tensor, "*batch n"]
    """Weights that u was read with: pre, or the `pre` that `boundary` was given."""
    link: BackwardLink | None
    """Link for the `write` that follows; None if the backend uses none."""


def link_of(grad_carrier: Tensor | None, x: Tensor, res: Tensor) -> BackwardLink | None:
    """Link of the streams x and res; None without a carrier."""
    return None if grad_carrier is None else BackwardLink(grad_carrier, x, res)


def carrier_of(link: BackwardLink | None, x: Tensor, res: Tensor) -> Tensor | None:
    """The link's carrier, if the link holds for x and res."""
    return link.grad_carrier if link is not None and link.x is x and link.res is res else None


class WriteInputs(NamedTuple):
    """Arguments of a write: x [N, n, C], y [N, C], post [N, n], res [N, o, i]."""

    x: Tensor
    y: Tensor
    post: Tensor
    res: Tensor


class ComputedMaps(NamedTuple):
    """Coefficients of N tokens, with the projections they come from."""

    pre: Tensor
    """[N, n]"""
    post: Tensor
    """[N, n]"""
    res: Tensor
    """[N, o, i]"""
    projected: Tensor
    """`v phi^T / rms(v)` [N, R]"""
    inverse_rms: Tensor
    """1 / rms(v) [N]"""


class SavedMaps(NamedTuple):
    """Part of `ComputedMaps` that the backward of the coefficients keeps."""

    res: Tensor
    projected: Tensor
    inverse_rms: Tensor


class SavedBoundary(NamedTuple):
    """Tensors of a boundary that its backward keeps, besides the maps."""

    written: Tensor
    """Streams that the write made [N, n, C]."""
    y: Tensor | None
    """Branch output of the write [N, C]; None for coefficients without a write, and so `post`."""
    post: Tensor | None
    """Write weights [N, n]."""
    pre: Tensor | None
    """Read weights [N, n] that were given; None if the new coefficients were used."""


class ReadingGradients(NamedTuple):
    """Gradients of the results of a reading; None for a result without one."""

    u: Tensor | None
    pre: Tensor | None
    post: Tensor | None
    res: Tensor | None
    link: Tensor | None
    """Gradient of the streams that the next write makes, [N, n, C]."""


class BoundaryGradients(NamedTuple):
    """Gradients of a boundary's inputs, in the order of its operator; empty for an absent input."""

    written: Tensor
    """Whole gradient of the written streams."""
    y: Tensor
    post: Tensor
    pre: Tensor
    phi: Tensor
    alpha: Tensor
    bias: Tensor
    weight: Tensor


MAPS = "Tensor phi, Tensor alpha, Tensor bias"
SETTINGS = (
    "str constraint, int iterations, bool transposed, float norm_eps, float hc_eps, bool learns"
)
NORM = "Tensor? weight, float input_eps"
SAVED_MAPS = "Tensor res, Tensor projected, Tensor inverse_rms"
SAVED_BOUNDARY = "Tensor written, Tensor y, Tensor post, Tensor? pre"
READING_GRADIENTS = (
    "Tensor? grad_u, Tensor? grad_pre, Tensor? grad_post, Tensor? grad_res, Tensor? grad_link"
)


def norm_or_none(pair: Sequence[Any]) -> InputNorm | None:
    """Norm of (weight, eps), as a schema spells it; None without a weight."""
    weight, eps = pair
    return None if weight is None else InputNorm(weight, eps)


GROUPS: dict[str, Callable[[Sequence[Any]], Any]] = {
    MAPS: MapParameters._make,
    SETTINGS: Settings._make,
    NORM: norm_or_none,
    SAVED_MAPS: SavedMaps._make,
    SAVED_BOUNDARY: SavedBoundary._make,
    READING_GRADIENTS: ReadingGradients._make,
}
"""Fragment of a schema -> function from its arguments to their value."""
