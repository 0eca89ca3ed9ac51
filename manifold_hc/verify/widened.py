"""Run code that was written for float32 in float64, without a change to it."""

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

NARROW = (torch.float32, torch.bfloat16, torch.float16)

CASTS = {
    torch.Tensor.float: torch.Tensor.double,
    torch.Tensor.bfloat16: torch.Tensor.double,
    torch.Tensor.half: torch.Tensor.double,
}

DTYPE: Any = torch.Tensor.dtype
"""The property, whose getter asks for the dtype of a tensor."""


class Widened(TorchFunctionMode):
    """Inside this mode every cast to a narrower dtype is a cast to float64.

    Implementations of mHC compute their coefficients in float32 (`x.float()`), which hides
    differences below 1e-7. With float64 inputs and parameters, the same code under this mode
    computes in float64. A float64 tensor says that it is float32, so that checks of the dtype pass.

    Example:
        >>> import torch
        >>> from manifold_hc.verify import Widened
        >>> with Widened():
        ...     third = torch.ones((), dtype=torch.float64).float() / 3
        >>> third.dtype
        torch.float64
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Replace casts and dtype arguments, and call the function."""
        func = CASTS.get(func, func)
        args = tuple(map(_widen, args))
        result = func(*args, **{key: _widen(value) for key, value in (kwargs or {}).items()})
        asks_dtype = func == DTYPE.__get__
        return torch.float32 if asks_dtype and result is torch.float64 else result


def _widen(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in NARROW else value
