"""Run the connections of a transformers model in float64, and its branches in their own dtype."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from manifold_hc.verify.widened import Widened


@contextmanager
def in_float64(layers: Sequence[nn.Module], head: nn.Module) -> Iterator[None]:
    """Inside this context the layers' streams, connections and writes are float64.

    The branches `self_attn` and `mlp` run in their own dtype, on a rounded input: their outputs are
    exact in float64, and a check of the connections takes them as given.
    """
    dtype = next(layers[0].get_submodule("self_attn").parameters()).dtype
    connections = [getattr(layer, name) for layer in layers for name in ("attn_hc", "ffn_hc")]
    with ExitStack() as undo:
        mode = undo.enter_context(_Switched())
        for module in (*connections, head):
            undo.enter_context(_float64_parameters(module))
        for module in (*layers, head):
            _around(undo, module, mode, to=torch.float64, inside=True)
        for layer in layers:
            for branch in map(layer.get_submodule, ("self_attn", "mlp")):
                _around(undo, branch, mode, to=dtype, inside=False)
        undo.callback(head.register_forward_hook(lambda _, __, h: h.to(dtype)).remove)
        yield


class _Switched(Widened):
    """A mode that widens only while it is on."""

    on = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call the function, widened or as it is."""
        if self.on:
            return super().__torch_function__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


def _around(
    undo: ExitStack, module: nn.Module, mode: _Switched, *, to: torch.dtype, inside: bool
) -> None:
    """Switch the mode to `inside` and floating-point inputs to a dtype while the module runs."""

    def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
        mode.on = False
        converted = tree_map_only(
            Tensor, lambda t: t.to(to) if t.is_floating_point() else t, (args, kwargs)
        )
        mode.on = inside
        return converted

    def after(_: nn.Module, args: Any, result: Any) -> Any:
        mode.on = False
        converted = tree_map_only(
            Tensor, lambda t: t.double() if t.is_floating_point() else t, result
        )
        mode.on = not inside
        return converted

    undo.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
    undo.callback(module.register_forward_hook(after).remove)


@contextmanager
def _float64_parameters(module: nn.Module) -> Iterator[None]:
    """Give the module float64 copies of its parameters, and its own ones back after."""
    own = [(parameter, parameter.data) for parameter in module.parameters()]
    try:
        for parameter, data in own:
            parameter.data = data.double()
        yield
    finally:
        for parameter, data in own:
            parameter.data = data
