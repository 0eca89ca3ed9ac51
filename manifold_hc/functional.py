"""The connections as functions, for any model: the reference's signatures plus `backend`.

Shapes and letters as in `manifold_hc.reference`. Any leading shape, any n >= 1, streams in
float64, float32, bfloat16 or float16; coefficient parameters in float32 or float64. Autocast does
not reach inside: the same inputs give the same results with and without it.

`backend`: "auto" takes the fastest backend that supports the call; a named one ("triton", "cpu",
"reference") never falls back and raises BackendError for a call that it does not support.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from manifold_hc import checks, reference
from manifold_hc.constraints import sinkhorn as reference_sinkhorn
from manifold_hc.kernels import pick, unfused
from manifold_hc.kernels.values import (
    BackwardLink,
    InputNorm,
    Reading,
    WriteInputs,
    carrier_of,
    fused_maps,
    link_of,
    settings_of,
)
from manifold_hc.numerics import preset, require_epsilon
from manifold_hc.precision import autocast_off
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


def expand(h: Float[Tensor, "*batch C"], n: int) -> Float[Tensor, "*batch n C"]:
    """Copy the embedding to n streams (arXiv 2409.19606, section 2).

    Args:
        h: Output of the embedding [..., C], any dtype.
        n: Number of streams, at least 1.

    Returns:
        Streams [..., n, C] in h's dtype, contiguous.

    Raises:
        ConfigError: n is not an integer, or below 1.
        ShapeError: h is a scalar.

    Example:
        >>> h = torch.randn(2, 5, 8)
        >>> functional.expand(h, 4).shape
        torch.Size([2, 5, 4, 8])
    """
    checks.check_expand(h, n)
    return reference.expand(h, n)


def sinkhorn(
    logits: Float[Tensor, "*batch n n"],
    iterations: int = 20,
    numerics: str = "paper",
    backend: str = "auto",
    *,
    hc_eps: float | None = None,
) -> Float[Tensor, "*batch n n"]:
    """Project towards the doubly stochastic matrices by Sinkhorn-Knopp.

    Source: arXiv 2512.24880, section 4.2; for "deepseek_v4" arXiv 2606.19348. The gradient is the
    exact one of the finite iteration. The rows of the result sum to 1, exactly with "paper" and up
    to `hc_eps` with "deepseek_v4"; the truncation error is in the columns.

    Args:
        logits: [..., n, n], floating point: `res` logits [o, i] for "paper", `comb` logits
            [source, target] for "deepseek_v4".
        iterations: Number of normalisations of columns and rows, 1 to 1000.
        numerics: A name in `manifold_hc.numerics.PRESETS`: order of steps and epsilons.
        backend: See the module.
        hc_eps: Epsilon of "deepseek_v4"; the preset's where None.

    Returns:
        `res[..., o, i]` in float32, or float64 for float64 logits.

    Raises:
        ShapeError, DtypeError: logits are not [..., n, n] in floating point.
        ConfigError: iterations are outside 1 to 1000, or numerics are unknown.
        BackendError: The named backend does not support the call.

    Example:
        >>> res = functional.sinkhorn(torch.randn(6, 4, 4))
        >>> torch.allclose(res.sum(-1), torch.ones(6, 4))
        True
    """
    chosen = preset(numerics, hc_eps=hc_eps)
    checks.check_iterations("sinkhorn", iterations)
    checks.check_logits(logits)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    kernels = pick("sinkhorn", backend, logits.shape[-1], [wide])
    with autocast_off(logits.device.type):
        if kernels is None:
            return reference_sinkhorn(wide, iterations, chosen)
        return kernels.sinkhorn(wide, iterations, chosen)


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
    """Compute mHC's read, write and mixing coefficients of every token.

    Source: arXiv 2512.24880, equations 7 and 8. Rows of phi and bias: pre (n) | post (n) | res (k).
    k is n*n for both Sinkhorn orders, "exact" and "none", 0 for "identity", n! for "permutation",
    2 log2(n) for "kronecker"; n*n rows are row-major, `res[o, i]`, or `comb[source, target]` with
    the presets of released models.

    Args:
        x: Streams [..., n, C], floating point.
        phi: Projection [2n + k, nC], float32 or float64; None, as alpha, for static maps.
        alpha: Gates [3] of pre, post and res, float32 or float64.
        bias: [2n + k], float32 or float64.
        iterations: Number of Sinkhorn-Knopp iterations, 1 to 1000.
        constraint: Set that res lies in: a name in `manifold_hc.constraints.CONSTRAINTS`.
        numerics: "paper", "deepseek_v4" (arXiv 2606.19348), "deepseek_v41" or "glm5".
        norm_eps: Epsilon inside the root of the RMS norm; the preset's where None.
        hc_eps: Epsilon of "deepseek_v4"; the preset's where None.
        backend: See the module.

    Returns:
        (pre [..., n], post [..., n], res [..., o, i]) in float32, or float64 where an input is.

    Raises:
        ShapeError, DtypeError: A tensor does not fit x; parameters are float32 or float64.
        ConfigError: Unknown constraint or numerics, or a number out of its range.
        BackendError: The named backend does not support the call.

    Example:
        >>> n, C = 4, 8
        >>> x, phi = torch.randn(2, 5, n, C), torch.zeros(2 * n + n * n, n * C)
        >>> alpha, bias = torch.full((3,), 0.01), torch.zeros(2 * n + n * n)
        >>> pre, post, res = functional.coefficients(x, phi, alpha, bias)
        >>> pre.shape, post.shape, res.shape
        (torch.Size([2, 5, 4]), torch.Size([2, 5, 4]), torch.Size([2, 5, 4, 4]))
    """
    chosen = preset(numerics, norm_eps=norm_eps, hc_eps=hc_eps)
    n = checks.check_maps("coefficients", x, phi, alpha, bias, iterations, constraint)
    kernels = pick("coefficients", backend, n, _given(x, phi, alpha, bias))
    maps = fused_maps(phi, alpha, bias, constraint)
    with autocast_off(x.device.type):
        if kernels is None or maps is None:
            return unfused.coefficients(
                kernels, x, phi, alpha, bias, iterations, constraint, chosen
            )
        return kernels.coefficients(x, maps, settings_of(chosen, iterations, constraint))


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
    """Compute `coefficients` and the `read` with them in one call: the start of a sublayer.

    Arguments and errors are those of `coefficients`; `learn_res` False gives `res` no gradient.
    Passing the result's `link` to the `write` or `boundary` that follows saves, in backward, a pass
    over the streams and a tensor of their size.

    Returns:
        Reading of the streams x, with the bits of separate calls.
    """
    chosen = preset(numerics, norm_eps=norm_eps, hc_eps=hc_eps)
    n = checks.check_maps("coefficients_and_read", x, phi, alpha, bias, iterations, constraint)
    kernels = pick("coefficients_and_read", backend, n, _given(x, phi, alpha, bias))
    maps = fused_maps(phi, alpha, bias, constraint)
    with autocast_off(x.device.type):
        if kernels is None or maps is None:
            pre, post, res = unfused.coefficients(
                kernels, x, phi, alpha, bias, iterations, constraint, chosen
            )
            u = unfused.read(kernels, x, pre)
            grad_carrier = None
        else:
            settings = settings_of(chosen, iterations, constraint, learn_res)
            pre, post, res, u, grad_carrier = kernels.coefficients_and_read(x, maps, settings)
    res = res if learn_res else res.detach()
    return Reading(pre, post, res, u, x, pre, link_of(grad_carrier, x, res))


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
    """Compute the `write` of one sublayer and `coefficients_and_read` of the next, fused.

    x, y, post, res and link are the write's; phi, alpha, bias and the keywords are those of the
    next sublayer. pre: read weights [..., n] of the next sublayer, None for its own; with the
    previous sublayer's pre this is DeepSeek-V4.1's single pass. input_norm: RMS norm of the next
    sublayer's input, applied to u. Errors are those of `write` and `coefficients`.

    Returns:
        Reading whose `x` are the written streams, with the bits of separate calls.
    """
    chosen = preset(numerics, norm_eps=norm_eps, hc_eps=hc_eps)
    n = checks.check_maps("boundary", x, phi, alpha, bias, iterations, constraint)
    checks.check_write("boundary", x, y, post, res)
    if pre is not None:
        checks.check_coefficient("boundary", "pre", pre, x, (n,))
    norm_weight = None
    if input_norm is not None:
        checks.check_input_norm("boundary", input_norm.weight, input_norm.eps, x)
        norm_weight = input_norm.weight
    given = _given(x, phi, alpha, bias, y, post, res, pre, norm_weight)
    kernels = pick("boundary", backend, n, given)
    maps = fused_maps(phi, alpha, bias, constraint)
    inputs, carrier = WriteInputs(x, y, post, res), carrier_of(link, x, res)
    with autocast_off(x.device.type):
        if kernels is None or maps is None:
            written = unfused.write(kernels, inputs, carrier)
            new_pre, new_post, new_res = unfused.coefficients(
                kernels, written, phi, alpha, bias, iterations, constraint, chosen
            )
            u = unfused.read(kernels, written, new_pre if pre is None else pre, input_norm)
            new_carrier = None
        else:
            settings = settings_of(chosen, iterations, constraint, learn_res)
            written, new_pre, new_post, new_res, u, new_carrier = kernels.boundary(
                inputs, pre, carrier, maps, input_norm, settings
            )
    new_res = new_res if learn_res else new_res.detach()
    read_weights = new_pre if pre is None else pre
    new_link = link_of(new_carrier, written, new_res)
    return Reading(new_pre, new_post, new_res, u, written, read_weights, new_link)


def hc_coefficients(
    x: Float[Tensor, "*batch n C"],
    phi: Float[Tensor, "rows C"] | None,
    alpha: Float[Tensor, "3"] | None,
    bias: Float[Tensor, " static"],
    *,
    norm_eps: float = 1e-20,
    backend: str = "auto",
) -> Coefficients:
    """Compute HC's coefficients: static, or dynamic through tanh (arXiv 2409.19606, eq. 10 to 13).

    Args:
        x: Streams [..., n, C], floating point.
        phi: Projection [2 + n, C] of every stream, rows pre (1) | post (1) | res (n, one an output
            stream), with the weight of the RMS norm folded in; float32 or float64. None, as alpha,
            for static maps.
        alpha: Gates [3] of pre, post and res; the paper's shared `s_a` is alpha[0] == alpha[2].
        bias: Static maps [2n + n*n], pre | post | res row-major [o, i], which is the transpose of
            the paper's `A_r`.
        norm_eps: Epsilon inside the root of the RMS norm over C.
        backend: See the module.

    Returns:
        (pre [..., n], post [..., n], res [..., o, i]) in float32, or float64 where an input is.

    Raises:
        ShapeError, DtypeError: A tensor does not fit x; parameters are float32 or float64.
        BackendError: The named backend does not support the call.

    Example:
        >>> n, C = 2, 8
        >>> x, phi = torch.randn(5, n, C), torch.randn(2 + n, C)
        >>> alpha, bias = torch.full((3,), 0.01), torch.tensor([1.0, 0, 1, 1, 1, 0, 0, 1])
        >>> pre, post, res = functional.hc_coefficients(x, phi, alpha, bias)
        >>> pre.shape, post.shape, res.shape
        (torch.Size([5, 2]), torch.Size([5, 2]), torch.Size([5, 2, 2]))
    """
    require_epsilon("hc_coefficients: norm_eps", norm_eps)
    n, channels = checks.streams_of("hc_coefficients", x)
    checks.check_parameters(
        "hc_coefficients", x, phi, alpha, bias, (2 + n, channels), 2 * n + n * n, 3
    )
    kernels = pick("hc_coefficients", backend, n, _given(x, phi, alpha, bias))
    with autocast_off(x.device.type):
        if kernels is None:
            return reference.hc_coefficients(x, phi, alpha, bias, norm_eps)
        return kernels.hc_coefficients(x, phi, alpha, bias, norm_eps)


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
    """Compute the weights of DeepSeek-V4's learned exit, for `collapse` (`hc_head`, 2606.19348).

    x [..., n, C]; phi [n, nC], alpha [1] and bias [n] in float32 or float64. Other arguments and
    errors are those of `coefficients`.

    Returns:
        Weights [..., n] in float32, or float64 where an input is.
    """
    chosen = preset(numerics, norm_eps=norm_eps, hc_eps=hc_eps)
    n, channels = checks.streams_of("exit_coefficients", x)
    checks.check_parameters("exit_coefficients", x, phi, alpha, bias, (n, n * channels), n, 1)
    kernels = pick("exit_coefficients", backend, n, _given(x, phi, alpha, bias))
    with autocast_off(x.device.type):
        if kernels is None:
            return reference.exit_coefficients(x, phi, alpha, bias, chosen)
        return kernels.exit_coefficients(x, phi, alpha, bias, chosen)


def read(
    x: Float[Tensor, "*batch n C"], pre: Float[Tensor, "*#batch n"], backend: str = "auto"
) -> Float[Tensor, "*batch C"]:
    """Compute a sublayer's input `u = sum_i pre[i] x[i]` (arXiv 2409.19606, section 2).

    Args:
        x: Streams [..., n, C], floating point.
        pre: Read weights [..., n], float32 or float64; the leading shape may broadcast.
        backend: See the module.

    Returns:
        u [..., C] in x's dtype, summed in pre's.

    Raises:
        ShapeError, DtypeError: pre does not fit x, or is below float32.
        BackendError: The named backend does not support the call.

    Example:
        >>> x, pre = torch.ones(5, 4, 8), torch.full((5, 4), 0.25)
        >>> torch.equal(functional.read(x, pre), torch.ones(5, 8))
        True
    """
    n, _ = checks.streams_of("read", x)
    checks.check_coefficient("read", "pre", pre, x, (n,))
    kernels = pick("read", backend, n, [x, pre])
    with autocast_off(x.device.type):
        if kernels is None:
            return reference.read(x, pre)
        return kernels.read(x, pre)


def write(
    x: Float[Tensor, "*batch n C"],
    y: Float[Tensor, "*batch C"],
    post: Float[Tensor, "*#batch n"],
    res: Float[Tensor, "*#batch n n"],
    backend: str = "auto",
    *,
    link: BackwardLink | None = None,
) -> Float[Tensor, "*batch n C"]:
    """Compute the next streams `x'[o] = sum_i res[o, i] x[i] + post[o] y` (arXiv 2409.19606).

    Args:
        x: Streams [..., n, C], floating point.
        y: Output of the sublayer [..., C], floating point.
        post: Write weights [..., n], float32 or float64; the leading shape may broadcast.
        res: Mixing matrix [..., o, i], row = output stream; as post.
        backend: See the module.
        link: From the `coefficients_and_read` of the same x and res, to share a backward pass.

    Returns:
        x' [..., n, C] in x's dtype.

    Raises:
        ShapeError, DtypeError: A tensor does not fit x, or a coefficient is below float32.
        BackendError: The named backend does not support the call.

    Example:
        >>> x, y = torch.zeros(5, 2, 8), torch.ones(5, 8)
        >>> x_next = functional.write(x, y, torch.tensor([1.0, 3.0]), torch.eye(2))
        >>> x_next[0, :, 0]
        tensor([1., 3.])
    """
    n = checks.check_write("write", x, y, post, res)
    kernels = pick("write", backend, n, [x, y, post, res])
    with autocast_off(x.device.type):
        if kernels is None:
            return reference.write(x, y, post, res)
        return kernels.write(x, y, post, res, carrier_of(link, x, res))


def rebuild(
    x: Float[Tensor, "*batch n C"],
    writes: Sequence[tuple[Tensor, Tensor, Tensor]],
    reads: Sequence[Tensor],
    norms: Sequence[InputNorm | None] | None = None,
    backend: str = "auto",
) -> tuple[list[Tensor], list[Tensor]]:
    """Compute a recompute block's streams and inputs again, without its branches (mHC, 4.3).

    x: streams [..., n, C] that the block starts with; writes: (y [..., C], post [..., n],
    res [..., o, i]) of each sublayer but the last; reads: read weights [..., n] of each sublayer;
    norms: norm of each sublayer's input, or None. Errors are those of `write` and `read`.

    Returns:
        (streams after each write, input of each sublayer), with the bits of `write`, `read` and
        `boundary`. They have no derivative.
    """
    own: list[InputNorm | None] = [None] * len(reads) if norms is None else list(norms)
    n = checks.check_rebuild(x, writes, reads, own)
    weights = [norm.weight for norm in own if norm is not None]
    given = [x, *(tensor for write in writes for tensor in write), *reads, *weights]
    kernels = pick("rebuild", backend, n, given)
    with torch.no_grad(), autocast_off(x.device.type):
        if kernels is None:
            return unfused.rebuild(x, writes, reads, own)
        return kernels.rebuild(x, writes, reads, own)


def collapse(
    x: Float[Tensor, "*batch n C"],
    weights: Float[Tensor, "*#batch n"] | None = None,
    backend: str = "auto",
) -> Float[Tensor, "*batch C"]:
    """Reduce the streams to one: their mean, or their sum weighted by `weights`.

    The sum of all streams (arXiv 2409.19606, section 2) has weights of 1; DeepSeek-V4's learned
    exit (arXiv 2606.19348) has those of `exit_coefficients`.

    Args:
        x: Streams [..., n, C], floating point.
        weights: [..., n] or [n], float32 or float64; None for the mean.
        backend: See the module.

    Returns:
        [..., C] in x's dtype.

    Raises:
        ShapeError, DtypeError: weights do not fit x, or are below float32.
        BackendError: The named backend does not support the call.

    Example:
        >>> x = torch.randn(2, 5, 4, 8)
        >>> functional.collapse(x).shape
        torch.Size([2, 5, 8])
        >>> torch.allclose(functional.collapse(x, torch.full((4,), 0.25)), x.mean(-2), atol=1e-6)
        True
    """
    n, _ = checks.streams_of("collapse", x)
    if weights is not None:
        checks.check_coefficient("collapse", "weights", weights, x, (n,))
    kernels = pick("collapse", backend, n, _given(x, weights))
    with autocast_off(x.device.type):
        if kernels is None or weights is None:
            return reference.collapse(x, weights)
        return kernels.read(x, weights)


def _given(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]
