"""Backends of the operators, and the choice between them: the seam between plain and fast."""

import logging
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import forward_ad

from manifold_hc.errors import BackendError
from manifold_hc.kernels.operators import Operators
from manifold_hc.kernels.support import OPERATORS, Unsupported, unsupported_reason

__all__ = ["BACKENDS", "Operators", "Unsupported", "backends", "pick", "unsupported_reason"]

logger = logging.getLogger("manifold_hc")

BACKENDS = ("triton", "cpu", "reference")
"""The preferred one first."""

MOST_STREAMS = 64
"""Largest n that torch.compile may pass as a symbol."""


def backends() -> list[str]:
    """Return the names of this version's backends, the preferred one first."""
    return list(BACKENDS)


def pick(operator: str, backend: str, n: int, tensors: Sequence[Tensor]) -> Operators | None:
    """Return the operators that compute a call with n streams; None for the reference.

    operator: name for errors; tensors: all of the call's, the streams first. "auto" takes the first
    backend that supports the call, and logs it once. A named backend never falls back: raises
    BackendError for a name that this version does not have, and for a call that the backend does
    not support.
    """
    device = tensors[0].device.type
    dtypes = tuple(tensor.dtype for tensor in tensors)
    chosen = _choose(operator, backend, _constant(n), device, dtypes)
    if chosen == "reference":
        return None
    if not torch.compiler.is_compiling() and _is_transformed():
        if backend != "auto":
            raise BackendError(
                f'{operator}: backend "{backend}" has derivatives by autograd alone, none by '
                'torch.func or in forward mode; use backend="reference"'
            )
        return None
    return OPERATORS[chosen]


def _constant(n: int) -> int:
    """n as a number where Dynamo passes a symbol: comparing the symbol makes it a number."""
    if torch.compiler.is_compiling():
        for number in range(1, MOST_STREAMS + 1):
            if n == number:
                return number
    return n


def _is_transformed() -> bool:
    """True under a transform of torch.func or forward mode, which know no custom operator."""
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
    if found := unsupported_reason(backend, n, device, dtypes):
        repair = "" if "use backend=" in str(found) else '; or use backend="auto"'
        raise BackendError(f'{operator}: backend "{backend}" {found}{repair}')
    return backend


# Dynamo traces neither a log message nor a cache. `torch.compiler.assume_constant_result` sets this
# too, but imports Dynamo for it, and Triton with that: a second before anything is computed.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _fastest(n: int, device: str, dtypes: tuple[torch.dtype, ...]) -> str:
    missing = []
    for name in BACKENDS:
        if name == "triton" and device == "cpu":
            continue  # its interpreter is for tests
        found = unsupported_reason(name, n, device, dtypes)
        if found is None:
            break
        if found.missing:
            missing.append(f"; {name} {found}")
    _log(name, device, dtypes[0], "".join(missing))
    return name


@cache
def _log(chosen: str, device: str, dtype: torch.dtype, missing: str) -> None:
    logger.log(
        logging.WARNING if missing else logging.INFO,
        'backend "auto": %s for %s streams on %s%s',
        chosen,
        str(dtype).removeprefix("torch."),
        device,
        missing,
    )
