"""Argument checks of the functions; every error names operation, wanted, got and repair."""

from collections.abc import Sequence

import torch
from torch import Tensor

from manifold_hc import constraints
from manifold_hc.errors import ConfigError, DtypeError, ShapeError
from manifold_hc.kernels.values import InputNorm
from manifold_hc.numerics import require_epsilon


def streams_of(operation: str, x: Tensor) -> tuple[int, int]:
    """Check the streams and return (n, C)."""
    if x.dim() < 2 or not x.shape[-2]:
        raise ShapeError(
            f"{operation}: x must be [..., n, C] but is {shape_of(x)}; "
            "was expand() called after the embedding?"
        )
    if not x.shape[-1]:
        raise ShapeError(f"{operation}: x must have channels but is {shape_of(x)}; C is at least 1")
    check_real(operation, x=x)
    return x.shape[-2], x.shape[-1]


def check_expand(h: Tensor, n: int) -> None:
    if not isinstance(n, int | torch.SymInt):
        raise ConfigError(f"expand: streams must be an integer but are {n!r}")
    if n < 1:
        raise ConfigError(f"expand: streams must be at least 1 but is {n}")
    if h.dim() < 1:
        raise ShapeError("expand: h must be [..., C] but is a scalar; pass the embedding's output")


def check_logits(logits: Tensor) -> None:
    if logits.dim() < 2 or logits.shape[-1] != logits.shape[-2] or not logits.shape[-1]:
        raise ShapeError(
            f"sinkhorn: logits must be [..., n, n] but are {shape_of(logits)}; "
            "unflatten the last dimension of a projection first"
        )
    check_real("sinkhorn", logits=logits)


def check_rebuild(
    x: Tensor,
    writes: Sequence[tuple[Tensor, Tensor, Tensor]],
    reads: Sequence[Tensor],
    norms: Sequence[InputNorm | None],
) -> int:
    """Check the arguments of `rebuild` and return n."""
    n, _ = streams_of("rebuild", x)
    if len(reads) != len(writes) + 1:
        raise ShapeError(
            f"rebuild: reads must be {len(writes) + 1}, one more than the writes, "
            f"but are {len(reads)}; the last sublayer's write belongs to the next block"
        )
    for y, post, res in writes:
        check_write("rebuild", x, y, post, res)
    for pre in reads:
        check_coefficient("rebuild", "pre", pre, x, (n,))
    if len(norms) != len(reads):
        raise ShapeError(f"rebuild: norms must be {len(reads)}, one a read, but are {len(norms)}")
    for norm in norms:
        if norm is not None:
            check_input_norm("rebuild", norm.weight, norm.eps, x)
    return n


def check_maps(
    operation: str,
    x: Tensor,
    phi: Tensor | None,
    alpha: Tensor | None,
    bias: Tensor,
    iterations: int,
    constraint: str,
) -> int:
    """Check the arguments of mHC's coefficients and return n."""
    check_iterations(operation, iterations)
    n, channels = streams_of(operation, x)
    rows = 2 * n + constraints.constraint(constraint, n).size(n)
    check_parameters(operation, x, phi, alpha, bias, (rows, n * channels), rows, 3)
    return n


def check_write(operation: str, x: Tensor, y: Tensor, post: Tensor, res: Tensor) -> int:
    """Check the arguments of a write and return n."""
    n, channels = streams_of(operation, x)
    wanted = (*x.shape[:-2], channels)
    if y.shape != wanted:
        raise ShapeError(
            f"{operation}: y must be {list(wanted)} for x {shape_of(x)} but is {shape_of(y)}; "
            "a branch must keep the shape of its input"
        )
    check_real(operation, y=y)
    check_device(operation, "y", y, x.device)
    check_coefficient(operation, "post", post, x, (n,))
    check_coefficient(operation, "res", res, x, (n, n))
    return n


def check_input_norm(operation: str, weight: Tensor, eps: float, x: Tensor) -> None:
    if weight.shape != x.shape[-1:]:
        raise ShapeError(
            f"{operation}: the input norm's weight must be {[x.shape[-1]]} for x {shape_of(x)} "
            f"but is {shape_of(weight)}; one number a channel"
        )
    check_wide(operation, "the input norm's weight", weight, x.device)
    require_epsilon(f"{operation}: the input norm's eps", eps)


def check_iterations(operation: str, iterations: int) -> None:
    most = constraints.MOST_ITERATIONS
    if not isinstance(iterations, int) or not 1 <= iterations <= most:
        raise ConfigError(
            f"{operation}: iterations must be a whole number from 1 to {most} but is {iterations}; "
            'constraint="exact" is the limit of more iterations'
        )


def check_real(operation: str, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.dtype.is_floating_point:
            raise DtypeError(
                f"{operation}: {name} must be a real floating-point tensor but is {tensor.dtype}; "
                "convert it first"
            )


def check_wide(operation: str, name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.dtype not in (torch.float32, torch.float64):
        raise DtypeError(
            f"{operation}: {name} must be float32 or float64 but is {tensor.dtype}; "
            "keep coefficients out of .to(bfloat16), as mhc.Connection does"
        )
    check_device(operation, name, tensor, device)


def check_device(operation: str, name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ShapeError(
            f"{operation}: {name} must be on {device} like x but is on {tensor.device}; "
            "move both to one device"
        )


def check_parameters(
    operation: str,
    x: Tensor,
    phi: Tensor | None,
    alpha: Tensor | None,
    bias: Tensor,
    phi_shape: tuple[int, int],
    bias_size: int,
    gates: int,
) -> None:
    if (phi is None) != (alpha is None):
        raise ShapeError(f"{operation}: phi and alpha go together; give both, or None for both")
    wanted = {"phi": (phi, phi_shape), "alpha": (alpha, (gates,)), "bias": (bias, (bias_size,))}
    for name, (tensor, shape) in wanted.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ShapeError(
                f"{operation}: {name} must be {list(shape)} for these streams "
                f"but is {shape_of(tensor)}; rows are pre | post | res"
            )
        check_wide(operation, name, tensor, x.device)


def check_coefficient(
    operation: str, name: str, tensor: Tensor, x: Tensor, own: tuple[int, ...]
) -> None:
    """Require the shape [*leading, *own], whose leading shape broadcasts to that of x."""
    leading, wanted = tensor.shape[: tensor.dim() - len(own)], x.shape[:-2]
    fits = len(leading) <= len(wanted) and all(
        a in (1, b) for a, b in zip(reversed(leading), reversed(wanted), strict=False)
    )
    if tensor.shape[len(leading) :] != own or tensor.dim() < len(own) or not fits:
        raise ShapeError(
            f"{operation}: {name} must be {[*wanted, *own]} for x {shape_of(x)} "
            f"but is {shape_of(tensor)}; coefficients come from the same x"
        )
    check_wide(operation, name, tensor, x.device)


def shape_of(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
