"""The one seam between plain and fast: a table of (operator, backend) -> function."""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from manifold_hc import constraints, reference
from manifold_hc.errors import BackendError

logger = logging.getLogger("manifold_hc")

OPERATORS: dict[tuple[str, str], Callable[..., Any]] = {
    ("sinkhorn", "reference"): constraints.sinkhorn,
    ("coefficients", "reference"): reference.coefficients,
    ("hc_coefficients", "reference"): reference.hc_coefficients,
    ("exit_coefficients", "reference"): reference.exit_coefficients,
    ("read", "reference"): reference.read,
    ("write", "reference"): reference.write,
    ("collapse", "reference"): reference.collapse,
}


def backends() -> list[str]:
    """The backends this installation has, the preferred one first."""
    return list(dict.fromkeys(backend for _, backend in OPERATORS))


def pick(operator: str, backend: str) -> Callable[..., Any]:
    """The function that serves `operator`; "auto" takes the preferred backend and logs it once.

    Raises BackendError for a backend that this installation does not have.
    """
    chosen = _automatic() if backend == "auto" else backend
    function = OPERATORS.get((operator, chosen))
    if function is None:
        raise BackendError(
            f"{operator}: backend must be one of auto, {', '.join(backends())} "
            f'but is {backend!r}, which this version does not have; use backend="auto"'
        )
    return function


@torch.compiler.assume_constant_result  # Dynamo traces neither a log message nor a cache
def _automatic() -> str:
    return _logged_choice()


@cache
def _logged_choice() -> str:
    chosen = backends()[0]
    logger.info('backend "auto": %s', chosen)
    return chosen
