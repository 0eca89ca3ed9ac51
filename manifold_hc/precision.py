"""Precision: modules whose parameters stay in float32, and the state of autocast."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from manifold_hc.errors import DtypeError


def has_autocast(device: str) -> bool:
    """True if autocast exists for this device type."""
    return torch.amp.is_autocast_available(device)


# Dynamo of PyTorch 2.10 cannot trace is_autocast_available; marked constants are not traced.
has_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_autocast(device: str) -> bool:
    """True if autocast is enabled for this device type."""
    return has_autocast(device) and torch.is_autocast_enabled(device)


def compute_dtype(u: Tensor) -> torch.dtype:
    """Return the dtype a linear layer computes in: autocast's dtype if it is enabled, else u's."""
    device = u.device.type
    return torch.get_autocast_dtype(device) if is_autocast(device) else u.dtype


def autocast_off(device: str) -> AbstractContextManager[object]:
    """Return a context without autocast for this type of device."""
    return torch.autocast(device, enabled=False) if is_autocast(device) else nullcontext()


class WideModule(nn.Module):
    """A module whose own parameters and buffers never fall below float32.

    `.to(bfloat16)`, `.half()` and a checkpoint in half precision leave them in float32;
    `.double()` converts them. `_require_wide` raises if something else has cast them.
    """

    _unit = "the stack, or on each connection outside of one,"

    def __init__(self) -> None:
        """Subclasses create their parameters in `wide_dtype()`."""
        super().__init__()
        self.register_load_state_dict_pre_hook(_widen_entries)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "WideModule":
        return cast("WideModule", super()._apply(lambda t: _at_least_float32(fn, t), recurse))

    def _require_wide(self) -> None:
        """Raise DtypeError for parameters below float32, which a sharding policy may gather."""
        for name, parameter in self._parameters.items():
            if parameter is not None and parameter.dtype.itemsize < 4:
                raise DtypeError(
                    f"{type(self).__name__}: {name} must be float32 or float64 but is "
                    f"{parameter.dtype}, to which a sharding policy casts it; call fully_shard on "
                    f"{self._unit} without a policy, before the fully_shard of the model"
                )


def wide_dtype() -> torch.dtype:
    """Return the dtype of coefficients: float32, or float64 if that is torch's default."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


def _at_least_float32(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Apply `fn`, a conversion passed down by nn.Module, but keep at least float32."""
    result: Any = fn(tensor)
    if result.is_floating_point() and result.dtype.itemsize < 4:
        return tensor.to(device=result.device, dtype=torch.float32)
    return cast(Tensor, result)


def _widen_entries(
    module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *rest: object
) -> None:
    """Widen half-precision entries of a checkpoint: `assign=True` would keep their dtype."""
    for name in (*module._parameters, *module._buffers):
        if (key := prefix + name) in state_dict:
            state_dict[key] = _at_least_float32(lambda tensor: tensor, state_dict[key])
