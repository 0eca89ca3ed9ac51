"""The one seam between plain and fast: a table of (operator, backend) -> function."""

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import forward_ad

from manifold_hc import constraints, reference
from manifold_hc.errors import BackendError
from manifold_hc.kernels.compiled import Compiled
from manifold_hc.kernels.serving import FAILED, refusal

__all__ = ["BACKENDS", "OPERATORS", "backends", "pick", "refusal"]

logger = logging.getLogger("manifold_hc")

BACKENDS = ("triton", "cpu", "reference")
"""The preferred one first."""

MOST_STREAMS = 64
"""Up to which torch.compile may be given n as a symbol."""

# The reference knows neither links nor what learns.
OPERATORS: dict[tuple[str, str], Callable[..., Any]] = {
    ("sinkhorn", "reference"): constraints.sinkhorn,
    ("coefficients", "reference"): reference.coefficients,
    ("coefficients_and_read", "reference"): lambda *a: reference.coefficients_and_read(*a[:7]),
    ("boundary", "reference"): lambda *a: reference.boundary(*a[:13]),
    ("hc_coefficients", "reference"): reference.hc_coefficients,
    ("exit_coefficients", "reference"): reference.exit_coefficients,
    ("read", "reference"): reference.read,
    ("write", "reference"): lambda *a: reference.write(*a[:4]),
    ("collapse", "reference"): reference.collapse,
    ("rebuild", "reference"): reference.rebuild,
    **Compiled("cpu").table(),
    **Compiled("triton").table(),
}


def backends() -> list[str]:
    """The backends this version has, the preferred one first."""
    return list(BACKENDS)


def pick(operator: str, backend: str, n: int, tensors: Sequence[Tensor]) -> Callable[..., Any]:
    """The function that serves `operator` on `tensors`, the streams first, with n streams.

    "auto" takes the first backend that can, and logs it once. Raises BackendError for a name that
    this version does not have, and where a named backend cannot serve the call: it never falls
    back.
    """
    device = tensors[0].device.type
    dtypes = tuple(tensor.dtype for tensor in tensors)
    chosen = _choose(operator, backend, _constant(n), device, dtypes)
    if chosen != "reference" and not torch.compiler.is_compiling() and _is_transformed():
        if backend != "auto":
            raise BackendError(
                f'{operator}: backend "{backend}" has derivatives by autograd alone, none by '
                'torch.func or in forward mode; use backend="reference"'
            )
        chosen = "reference"
    return OPERATORS[operator, chosen]


def _constant(n: int) -> int:
    """n, where Dynamo may bring a symbol: comparing it makes it the number it stands for."""
    if torch.compiler.is_compiling():
        for number in range(1, MOST_STREAMS + 1):
            if n == number:
                return number
    return n


def _is_transformed() -> bool:
    """Whether derivatives are taken of which a custom operator knows nothing."""
    interpreters = torch._C._functorch.get_interpreter_stack() or ()
    return forward_ad._current_level >= 0 or any(
        interpreter.key() in (TransformType.Grad, TransformType.Jvp) for interpreter in interpreters
    )


def _choose(
    operator: str, backend: str, n: int, device: str, dtypes: tuple[torch.dtype, ...]
) -> str:
    if backend == "auto":
        return _fastest(n, device, dtypes)
    if backend not in BACKENDS:
        raise BackendError(
            f"{operator}: backend must be one of auto, {', '.join(BACKENDS)} "
            f'but is {backend!r}, which this version does not have; use backend="auto"'
        )
    if reason := refusal(backend, n, device, dtypes):
        repair = "" if "use backend=" in reason else '; or use backend="auto"'
        raise BackendError(f'{operator}: backend "{backend}" {reason}{repair}')
    return backend


# Dynamo traces neither a log message nor a cache. `torch.compiler.assume_constant_result` sets this
# too, but imports Dynamo for it, and Triton with that: a second before anything is computed.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _fastest(n: int, device: str, dtypes: tuple[torch.dtype, ...]) -> str:
    failures = []
    for name in BACKENDS:
        if name == "triton" and device == "cpu":
            continue  # its interpreter is for tests
        reason = refusal(name, n, device, dtypes)
        if not reason:
            break
        if reason.startswith(FAILED):
            failures.append(f"; {name} {reason}")
    _log(name, device, dtypes[0], "".join(failures))
    return name


@cache
def _log(chosen: str, device: str, dtype: torch.dtype, failures: str) -> None:
    logger.log(
        logging.WARNING if failures else logging.INFO,
        'backend "auto": %s for %s streams on %s%s',
        *(chosen, str(dtype).removeprefix("torch."), device, failures),
    )
