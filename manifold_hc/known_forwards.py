"""Modules whose call runs exactly the forward that their class was written with.

Only such a module may be computed by a kernel instead, or run a second time in backward: a hook,
a replaced or compiled forward, or a parametrization would be passed over in silence.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from manifold_hc.functional import InputNorm
from manifold_hc.precision import is_autocast

_CALL, _CALL_IMPL = nn.Module.__call__, nn.Module._call_impl


def is_original_forward(kind: type, forward: Callable[..., Any]) -> bool:
    """True if the class body itself defines this forward: neither patched in later nor wrapped."""
    code = getattr(forward, "__code__", None)
    return (
        code is not None
        and code.co_qualname == f"{kind.__qualname__}.forward"
        and forward.__module__ == kind.__module__
    )


KNOWN_FORWARDS: dict[type, Callable[..., Any]] = {
    kind: kind.forward
    for kind in (nn.RMSNorm, nn.LayerNorm)
    if is_original_forward(kind, kind.forward)
}
"""Forward of each class that kernels and recompute know, as its class body defines it.

`manifold_hc.connection` adds its own classes.
"""


def known_forward(kind: type) -> Callable[..., Any] | None:
    """Return the forward that kernels and recompute may replace for this class, or None.

    It is either the one in `KNOWN_FORWARDS`, or the one of the class that defines `input_norm`,
    a method that promises the norm which its forward computes. A subclass that overrides forward
    alone has none.
    """
    for base in kind.__mro__:
        if base in KNOWN_FORWARDS:
            return KNOWN_FORWARDS[base]
        if "input_norm" in vars(base):
            made: Callable[..., Any] = cast(type[nn.Module], base).forward
            return made if any(is_original_forward(owner, made) for owner in base.__mro__) else None
    return None


def has_global_hooks() -> bool:
    """True if a hook is registered on all modules (`torch.nn.modules.module`)."""
    everywhere = nn.modules.module
    return bool(
        everywhere._global_forward_hooks
        or everywhere._global_forward_pre_hooks
        or everywhere._global_backward_hooks
        or everywhere._global_backward_pre_hooks
    )


def is_altered(module: nn.Module) -> bool:
    """True if a call of this module runs something besides its class's forward.

    That is a replaced or compiled forward, a hook of its own, or a parametrization of its weights
    (`torch.nn.utils.parametrize`).
    """
    kind = type(module)
    return any(
        (
            kind.__call__ is not _CALL,
            # Of the instance, not of its __dict__, whose changes torch.compile does not notice.
            not _is_method(module._call_impl, _CALL_IMPL),
            not _is_method(module.forward, kind.forward),
            module._compiled_call_impl is not None,
            "parametrizations" in module._modules,
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
    )


def is_untouched(module: nn.Module) -> bool:
    """True if this module runs `known_forward` without hooks of its own; others may watch it."""
    known = known_forward(type(module))
    return known is not None and type(module).forward is known and not is_altered(module)


def _is_method(bound: Callable[..., Any], function: Callable[..., Any]) -> bool:
    """True if this is the function, bound to an object."""
    # Dynamo traces isinstance; it finds no `__func__` by hasattr, nor by getattr with a default.
    return isinstance(bound, MethodType) and bound.__func__ is function


def runs_known_forward(module: nn.Module) -> bool:
    """True if a call of this module runs `known_forward` alone: no hook, not even a global one."""
    return is_untouched(module) and not has_global_hooks()


def is_pure(norm: nn.Module) -> bool:
    """True if this norm is pure and has no hooks, submodules included: backward may rerun it."""
    return runs_known_forward(norm) and not any(map(is_altered, norm.modules()))


def kernel_norm(norm: Callable[[Tensor], Tensor], x: Tensor) -> InputNorm | None:
    """Return the norm in the form that a kernel computes, or None if the norm itself must run.

    A kernel computes an RMSNorm over C: torch's in x's own dtype and with an epsilon, or one with a
    method `input_norm(dtype)`.
    """
    if not isinstance(norm, nn.RMSNorm) or norm.normalized_shape != x.shape[-1:]:
        return None
    if not runs_known_forward(norm):
        return None
    if callable(known := getattr(norm, "input_norm", None)):
        return cast(InputNorm, known(x.dtype))
    plain = type(norm) is nn.RMSNorm and not is_autocast(x.device.type)
    if not plain or norm.eps is None or norm.weight is None or norm.weight.dtype != x.dtype:
        return None
    return InputNorm(norm.weight.to(torch.promote_types(x.dtype, torch.float32)), norm.eps)
