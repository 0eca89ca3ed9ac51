"""The connections as functions, for anybody's model: reference signatures plus `backend`.

Shapes and letters as in `manifold_hc.reference`. Any leading shape, any n >= 1, streams in
float64, float32, bfloat16 or float16; coefficient parameters in float32 or float64. Autocast does
not reach inside: the same inputs give the same answers with and without it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from manifold_hc import reference
from manifold_hc.checks import (
    check_coefficient,
    check_input_norm,
    check_iterations,
    check_maps,
    check_parameters,
    check_real,
    check_write,
    shape_of,
    streams_of,
)
from manifold_hc.errors import ConfigError, ShapeError
from manifold_hc.kernels import pick
from manifold_hc.numerics import preset, require_epsilon
from manifold_hc.precision import is_autocast
from manifold_hc.reference import Coefficients

__all__ = [
    "BackwardLink",
    "InputNorm",
    "Reading",
    "boundary",
    "coefficients",
    "coefficients_and_read",
    "collapse",
    "exit_coefficients",
    "expand",
    "hc_coefficients",
    "read",
    "rebuild",
    "sinkhorn",
    "write",
]


class BackwardLink(NamedTuple):
    """Ties a write to the coefficients its streams were read with, so that both share a backward.

    Opaque. It holds for these streams and this `res`, whose gradients come through it; a write with
    others does without.
    """

    grad_carrier: Float[Tensor, "*tokens n C"]
    x: Float[Tensor, "*batch n C"]
    res: Float[Tensor, "*batch o i"]


class Reading(NamedTuple):
    """The coefficients of a sublayer, and what it reads with them."""

    pre: Float[Tensor, "*batch n"]
    post: Float[Tensor, "*batch n"]
    res: Float[Tensor, "*batch o i"]
    u: Float[Tensor, "*batch C"]
    """What was read, after `input_norm` where that was given."""
    x: Float[Tensor, "*batch n C"]
    """The streams themselves."""
    read_weights: Float[Tensor, "*batch n"]
    """What u was read with: pre, or what `boundary` was given for it."""
    link: BackwardLink | None
    """For the `write` that follows; None where the backend has no use for it."""


class InputNorm(NamedTuple):
    """The RMS norm of a sublayer's input."""

    weight: Float[Tensor, " C"]
    eps: float
    """Inside the root."""


def expand(h: Float[Tensor, "*batch C"], n: int) -> Float[Tensor, "*batch n C"]:
    """Copy the embedding to n streams: [..., C] -> [..., n, C].

    Raises ConfigError for n < 1, ShapeError for a scalar.
    """
    if not isinstance(n, int | torch.SymInt):
        raise ConfigError(f"expand: streams must be an integer but are {n!r}")
    if n < 1:
        raise ConfigError(f"expand: streams must be at least 1 but is {n}")
    if h.dim() < 1:
        raise ShapeError("expand: h must be [..., C] but is a scalar; pass the embedding's output")
    return reference.expand(h, n)


def sinkhorn(
    logits: Float[Tensor, "*batch n n"],
    iterations: int = 20,
    numerics: str = "paper",
    backend: str = "auto",
    *,
    hc_eps: float | None = None,
) -> Float[Tensor, "*batch n n"]:
    """Sinkhorn-Knopp towards the doubly stochastic matrices (arXiv 2512.24880, section 4.2).

    logits: `res` logits [..., o, i] for "paper", `comb` logits [..., source, target] for
    "deepseek_v4". Returns `res[..., o, i]` in float32 or float64, with the exact gradient of the
    finite iteration. The rows of res sum to 1, exactly with "paper" and up to `hc_eps` with
    "deepseek_v4" (they are comb's columns, which its iteration normalises last); the truncation
    error is in the columns of both.

    Raises ShapeError, DtypeError, or ConfigError for iterations outside 1 to 1000 or unknown
    numerics.
    """
    chosen = preset(numerics, hc_eps=hc_eps)
    check_iterations("sinkhorn", iterations)
    if logits.dim() < 2 or logits.shape[-1] != logits.shape[-2] or not logits.shape[-1]:
        raise ShapeError(
            f"sinkhorn: logits must be [..., n, n] but are {shape_of(logits)}; "
            "unflatten the last dimension of a projection first"
        )
    check_real("sinkhorn", logits=logits)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    n = logits.shape[-1]
    result: Tensor = _run("sinkhorn", backend, n, [wide], wide, iterations, chosen)
    return result


def coefficients(
    x: Float[Tensor, "*batch n C"],
    phi: Float[Tensor, "rows nC"] | None,
    alpha: Float[Tensor, "3"] | None,
    bias: Float[Tensor, " rows"],
    *,
    iterations: int = 20,
    constraint: str = "sinkhorn",
    numerics: str = "paper",
    norm_eps: float | None = None,
    hc_eps: float | None = None,
    backend: str = "auto",
) -> Coefficients:
    """mHC's read, write and mixing coefficients of every token (arXiv 2512.24880, section 4.2).

    x: [..., n, C]; phi: [2n + k, nC]; alpha: [3] (pre, post, res); bias: [2n + k], rows
    pre | post | res, where k = n*n for "sinkhorn", "exact" and "none", 0 for "identity", n! for
    "permutation" and 2 log2(n) for "kronecker". The n*n rows are `res[o, i]` row-major for
    "paper", `comb[source, target]` row-major for "deepseek_v4". With phi and alpha None the maps
    are static. `norm_eps` and `hc_eps` default to the preset's.

    Returns (pre [..., n], post [..., n], res [..., o, i]) in float32, or float64 where an input is.
    Raises ShapeError, DtypeError (integer or complex input, parameters below float32),
    ConfigError, BackendError.
    """
    chosen = preset(numerics, norm_eps=norm_eps, hc_eps=hc_eps)
    n = check_maps("coefficients", x, phi, alpha, bias, iterations, constraint)
    result: Coefficients = _run(
        *("coefficients", backend, n, _given(x, phi, alpha, bias)),
        *(x, phi, alpha, bias, iterations, constraint, chosen),
    )
    return result


def coefficients_and_read(
    x: Float[Tensor, "*batch n C"],
    phi: Float[Tensor, "rows nC"] | None,
    alpha: Float[Tensor, "3"] | None,
    bias: Float[Tensor, " rows"],
    *,
    iterations: int = 20,
    constraint: str = "sinkhorn",
    numerics: str = "paper",
    norm_eps: float | None = None,
    hc_eps: float | None = None,
    learn_res: bool = True,
    backend: str = "auto",
) -> Reading:
    """`coefficients` and the `read` with them at once: what a sublayer starts with.

    Arguments and errors are those of `coefficients`. Handing the result's `link` to the `write` or
    `boundary` that follows saves, in backward, a pass over the streams and a tensor of their size.
    learn_res: whether `res` has a gradient.
    """
    chosen = preset(numerics, norm_eps=norm_eps, hc_eps=hc_eps)
    n = check_maps("coefficients_and_read", x, phi, alpha, bias, iterations, constraint)
    pre, post, res, u, grad_carrier = _run(
        *("coefficients_and_read", backend, n, _given(x, phi, alpha, bias)),
        *(x, phi, alpha, bias, iterations, constraint, chosen, learn_res),
    )
    res = res if learn_res else res.detach()
    return Reading(pre, post, res, u, x, pre, _link(grad_carrier, x, res))


def boundary(
    x: Float[Tensor, "*batch n C"],
    y: Float[Tensor, "*batch C"],
    post: Float[Tensor, "*#batch n"],
    res: Float[Tensor, "*#batch n n"],
    phi: Float[Tensor, "rows nC"] | None,
    alpha: Float[Tensor, "3"] | None,
    bias: Float[Tensor, " rows"],
    *,
    pre: Float[Tensor, "*#batch n"] | None = None,
    input_norm: InputNorm | None = None,
    link: BackwardLink | None = None,
    iterations: int = 20,
    constraint: str = "sinkhorn",
    numerics: str = "paper",
    norm_eps: float | None = None,
    hc_eps: float | None = None,
    learn_res: bool = True,
    backend: str = "auto",
) -> Reading:
    """All that lies between two sublayers: the write of one, `coefficients_and_read` of the next.

    x, y, post, res and link: as `write` takes them; phi, alpha, bias and what follows: the next
    sublayer's, as `coefficients_and_read` takes them. The next sublayer reads with its own pre; or
    with `pre` [..., n] where that is given, the one that the sublayer before it has made: then it
    is DeepSeek-V4.1's single pass. input_norm: the RMS norm of what was read, computed with it.

    Returns the written streams as the `x` of a Reading. The same bits as `write` and then
    `coefficients_and_read`.
    Raises ShapeError, DtypeError, ConfigError, BackendError.
    """
    chosen = preset(numerics, norm_eps=norm_eps, hc_eps=hc_eps)
    n = check_maps("boundary", x, phi, alpha, bias, iterations, constraint)
    check_write("boundary", x, y, post, res)
    weight, eps = (None, 0.0) if input_norm is None else input_norm
    if pre is not None:
        check_coefficient("boundary", "pre", pre, x, (n,))
    if weight is not None:
        check_input_norm("boundary", weight, eps, x)
    given = _given(x, phi, alpha, bias, y, post, res, pre, weight)
    arguments = (x, y, post, res, pre, phi, alpha, bias, weight, eps)
    written, new_pre, new_post, new_res, u, grad_carrier = _run(
        *("boundary", backend, n, given, *arguments, iterations, constraint, chosen),
        *(learn_res, _grad_carrier(link, x, res)),
    )
    new_res = new_res if learn_res else new_res.detach()
    weights = new_pre if pre is None else pre
    new_link = _link(grad_carrier, written, new_res)
    return Reading(new_pre, new_post, new_res, u, written, weights, new_link)


def _link(grad_carrier: Tensor | None, x: Tensor, res: Tensor) -> BackwardLink | None:
    return None if grad_carrier is None else BackwardLink(grad_carrier, x, res)


def _grad_carrier(link: BackwardLink | None, x: Tensor, res: Tensor) -> Tensor | None:
    """The link's, if it holds for these."""
    return link.grad_carrier if link is not None and link.x is x and link.res is res else None


def hc_coefficients(
    x: Float[Tensor, "*batch n C"],
    phi: Float[Tensor, "rows C"] | None,
    alpha: Float[Tensor, "3"] | None,
    bias: Float[Tensor, " static"],
    *,
    norm_eps: float = 1e-20,
    backend: str = "auto",
) -> Coefficients:
    """HC's coefficients: static, or dynamic through tanh (arXiv 2409.19606, section 2).

    x: [..., n, C]; phi: [2 + n, C], rows pre | post | res by output stream; alpha: [3] (pre, post,
    res; the paper's shared `s_a` is alpha[0] == alpha[2]); bias: [2n + n*n], the static
    pre | post | res row-major [o, i], which is the transpose of the paper's `A_r`. With phi and
    alpha None the maps are static. The normalisation is RMS over C, its weight folded into phi.

    Returns (pre [..., n], post [..., n], res [..., o, i]) in float32, or float64 where an input is.
    Raises ShapeError, DtypeError, ConfigError, BackendError.
    """
    require_epsilon("hc_coefficients: norm_eps", norm_eps)
    n, channels = streams_of("hc_coefficients", x)
    check_parameters("hc_coefficients", x, phi, alpha, bias, (2 + n, channels), 2 * n + n * n, 3)
    given = _given(x, phi, alpha, bias)
    result: Coefficients = _run("hc_coefficients", backend, n, given, x, phi, alpha, bias, norm_eps)
    return result


def exit_coefficients(
    x: Float[Tensor, "*batch n C"],
    phi: Float[Tensor, "n nC"],
    alpha: Float[Tensor, "1"],
    bias: Float[Tensor, " n"],
    *,
    numerics: str = "deepseek_v4",
    norm_eps: float | None = None,
    hc_eps: float | None = None,
    backend: str = "auto",
) -> Float[Tensor, "*batch n"]:
    """Weights of DeepSeek-V4's learned exit, for `collapse` (`hc_head`, arXiv 2606.19348).

    x: [..., n, C]; phi: [n, nC]; alpha: [1]; bias: [n]. Returns [..., n].
    Raises ShapeError, DtypeError, ConfigError, BackendError.
    """
    chosen = preset(numerics, norm_eps=norm_eps, hc_eps=hc_eps)
    n, channels = streams_of("exit_coefficients", x)
    check_parameters("exit_coefficients", x, phi, alpha, bias, (n, n * channels), n, 1)
    given = _given(x, phi, alpha, bias)
    result: Tensor = _run("exit_coefficients", backend, n, given, x, phi, alpha, bias, chosen)
    return result


def read(
    x: Float[Tensor, "*batch n C"], pre: Float[Tensor, "*#batch n"], backend: str = "auto"
) -> Float[Tensor, "*batch C"]:
    """A sublayer's input `u = sum_i pre[i] x[i]`: [..., n, C] -> [..., C], in x's dtype.

    Raises ShapeError, DtypeError, BackendError.
    """
    n, _ = streams_of("read", x)
    check_coefficient("read", "pre", pre, x, (n,))
    result: Tensor = _run("read", backend, n, [x, pre], x, pre)
    return result


def write(
    x: Float[Tensor, "*batch n C"],
    y: Float[Tensor, "*batch C"],
    post: Float[Tensor, "*#batch n"],
    res: Float[Tensor, "*#batch n n"],
    backend: str = "auto",
    *,
    link: BackwardLink | None = None,
) -> Float[Tensor, "*batch n C"]:
    """The next streams `x'[o] = sum_i res[o, i] x[i] + post[o] y`: [..., n, C], in x's dtype.

    link: from the `coefficients_and_read` of the same x and res.
    Raises ShapeError, DtypeError, BackendError.
    """
    n = check_write("write", x, y, post, res)
    result: Tensor = _run(
        "write", backend, n, [x, y, post, res], x, y, post, res, _grad_carrier(link, x, res)
    )
    return result


def rebuild(
    x: Float[Tensor, "*batch n C"],
    writes: Sequence[tuple[Tensor, Tensor, Tensor]],
    reads: Sequence[Tensor],
    norms: Sequence[InputNorm | None] | None = None,
    backend: str = "auto",
) -> tuple[list[Tensor], list[Tensor]]:
    """A run of sublayers by what is kept of them, their branches left out (mHC, section 4.3).

    writes: (y [..., C], post [..., n], res [..., o, i]) of each sublayer but the last; reads: what
    each of them reads with, [..., n]; norms: what its input goes through then, if anything. Returns
    the streams after each write and the input of each sublayer, the same bits as `write`, `read`
    and `boundary` make. It has no derivative.
    Raises ShapeError, DtypeError, BackendError.
    """
    n, _ = streams_of("rebuild", x)
    if len(reads) != len(writes) + 1:
        raise ShapeError(
            f"rebuild: reads must be {len(writes) + 1}, one more than the writes, "
            f"but are {len(reads)}; what the last sublayer writes is the next block's"
        )
    for y, post, res in writes:
        check_write("rebuild", x, y, post, res)
    for pre in reads:
        check_coefficient("rebuild", "pre", pre, x, (n,))
    if norms is not None and len(norms) != len(reads):
        raise ShapeError(f"rebuild: norms must be {len(reads)}, one a read, but are {len(norms)}")
    pairs = [(None, 0.0) if norm is None else norm for norm in norms or [None] * len(reads)]
    for weight, eps in pairs:
        if weight is not None:
            check_input_norm("rebuild", weight, eps, x)
    weights = _given(*(weight for weight, _ in pairs))
    given = [x, *(tensor for write in writes for tensor in write), *reads, *weights]
    with torch.no_grad():
        streams, inputs = _run("rebuild", backend, n, given, x, writes, reads, pairs)
    return streams, inputs


def collapse(
    x: Float[Tensor, "*batch n C"],
    weights: Float[Tensor, "*#batch n"] | None = None,
    backend: str = "auto",
) -> Float[Tensor, "*batch C"]:
    """The streams as one: their mean, or their sum weighted by `weights` [..., n] or [n].

    Raises ShapeError, DtypeError, BackendError.
    """
    n, _ = streams_of("collapse", x)
    if weights is not None:
        check_coefficient("collapse", "weights", weights, x, (n,))
    result: Tensor = _run("collapse", backend, n, _given(x, weights), x, weights)
    return result


def _given(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _run(operator: str, backend: str, n: int, tensors: Sequence[Tensor], *arguments: Any) -> Any:
    """`tensors`: what decides which backend serves, the streams first."""
    function = pick(operator, backend, n, tensors)
    device = tensors[0].device.type
    if is_autocast(device):
        with torch.autocast(device, enabled=False):
            return function(*arguments)
    return function(*arguments)
