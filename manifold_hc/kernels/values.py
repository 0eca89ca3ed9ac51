"""What travels together between functions, operators and kernels, as one value each.

Only the schema of a torch operator spells them out: PyTorch takes tensors and numbers alone. The
fragments of a schema stand next to the value that they become.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor


class MapParameters(NamedTuple):
    """Parameters of a sublayer's dynamic maps: R rows, pre | post | res."""

    phi: Tensor
    """[R, nC]"""
    alpha: Tensor
    """[3]: gates of pre, post and res."""
    bias: Tensor
    """[R]"""


class Settings(NamedTuple):
    """Numbers behind a token's coefficients."""

    constraint: str
    iterations: int
    transposed: bool
    """True if the n*n rows are DeepSeek-V4's `comb[source, target]`, in its order of steps."""
    norm_eps: float
    hc_eps: float
    learns: bool
    """True if the gradient that comes through the link is a gradient of res too."""


class InputNorm(NamedTuple):
    """RMS norm of a sublayer's input."""

    weight: Float[Tensor, " C"]
    eps: float
    """Epsilon inside the root."""


class WriteInputs(NamedTuple):
    """Arguments of a write: x [N, n, C], y [N, C], post [N, n], res [N, o, i]."""

    x: Tensor
    y: Tensor
    post: Tensor
    res: Tensor


class Maps(NamedTuple):
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
    """What the backward of the coefficients keeps of `Maps`."""

    res: Tensor
    projected: Tensor
    inverse_rms: Tensor


class ReadingGradients(NamedTuple):
    """Gradients that reach a reading; None where none does."""

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
READING_GRADIENTS = (
    "Tensor? grad_u, Tensor? grad_pre, Tensor? grad_post, Tensor? grad_res, Tensor? grad_link"
)


def input_norm(weight: Tensor | None, eps: float) -> InputNorm | None:
    """The norm that a schema spells as `NORM`; None without a weight."""
    return None if weight is None else InputNorm(weight, eps)


GROUPS: dict[str, Callable[..., Any]] = {
    MAPS: MapParameters,
    SETTINGS: Settings,
    NORM: input_norm,
    SAVED_MAPS: SavedMaps,
    READING_GRADIENTS: ReadingGradients,
}
"""Fragment of a schema -> the value that an operator makes of it."""
