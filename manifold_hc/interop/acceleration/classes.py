"""Classes that replace those of transformers: subclasses with another forward.

A module gets another class and nothing else: its parameters, hooks and attributes stay, and with
the first class the module is as before.
"""

from functools import cache
from types import MethodType
from typing import Any, cast

from torch import nn

from manifold_hc.errors import ConfigError
from manifold_hc.interop.acceleration.parts import TESTED, Part, part_of


def accelerated_class(kind: type[nn.Module], part: Part, backend: str) -> type[nn.Module]:
    """Return the subclass of `kind` with the part's forward.

    It keeps the name: FSDP's policies and device maps find layers by the name of their class.
    """
    return _made_class(cast(Any, kind), part, backend)


@cache
def _made_class(kind: type[nn.Module], part: Part, backend: str) -> type[nn.Module]:
    body: dict[str, Any] = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "__reduce_ex__": _reduce,
        "forward": part.forward,
        "mhc_backend": backend,
        "mhc_replaces": kind,
    }
    if part.maps is not None:
        body["mhc_maps"] = part.maps
    return type(kind.__name__, (kind,), body)


def is_accelerated(module: nn.Module) -> bool:
    """True if the module's class, or a class it derives from, was made by `accelerated_class`."""
    return hasattr(type(module), "mhc_replaces")


def replaced_class(module: nn.Module) -> type[nn.Module] | None:
    """Return the class that an accelerated module had before; None for another class's module."""
    return vars(type(module)).get("mhc_replaces")


def change_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Give the module another class.

    Hooks of the package accelerate hold the forward that they run as a bound method, which is bound
    again.
    """
    hooked = _hooked_forward(module)
    module.__class__ = kind
    if hooked is not None:
        vars(module)["_old_forward"] = MethodType(kind.forward, module)


def has_own_forward(module: nn.Module) -> bool:
    """True if the instance has a forward that `change_class` would not replace."""
    return "forward" in vars(module) and _hooked_forward(module) is None


def _hooked_forward(module: nn.Module) -> MethodType | None:
    """The class's forward as a hook of the package accelerate holds it, or None."""
    held = vars(module).get("_old_forward")
    if not isinstance(held, MethodType) or held.__func__ is not type(module).forward:
        return None
    return held


def _reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
    """Copy and pickle: the class is made again from the one that it replaces."""
    kind = next(vars(base)["mhc_replaces"] for base in type(self).__mro__ if _is_made(base))
    _, _, *state = kind.__reduce_ex__(self, protocol)
    return (_rebuild, (kind, type(self).mhc_backend), *state)  # type: ignore[attr-defined]


def _is_made(kind: type) -> bool:
    return "mhc_replaces" in vars(kind)


def _rebuild(kind: type, backend: str) -> nn.Module:
    """Return an empty module of the accelerated class; pickle fills in its state."""
    part = part_of(kind)
    if part is None:
        raise ConfigError(
            f"accelerate: the pickle holds an accelerated {kind.__name__}, which the installed "
            f"transformers does not have; install transformers {' or '.join(TESTED)}"
        )
    made = accelerated_class(kind, part, backend)
    return made.__new__(made)
