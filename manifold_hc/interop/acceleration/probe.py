"""Comparison of transformers' forwards with ours, before one replaces the other.

A new version of transformers may change the equations of a class and keep its name. So every class
runs once on a few random numbers, by its own forward and by ours, with stand-ins for attention,
feed-forward and norms, and both must give the same and call the stand-ins in the same way.
"""

import inspect
from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from manifold_hc.interop.acceleration.classes import accelerated_class
from manifold_hc.interop.acceleration.parts import Part, attention_result, part_of
from manifold_hc.precision import autocast_off

TOLERANCE = 1e-4
"""Largest difference, relative to the largest entry; both compute in float32."""

TOKENS, CHANNELS = 3, 4

Calls = list[tuple[str, tuple[Any, ...], dict[str, Any]]]
"""Name of a stand-in, and the arguments of each of its calls."""


def original_forward(kind: type[nn.Module]) -> Callable[..., Any]:
    """Return the forward of a class, without the checkpointing that transformers puts around."""
    return inspect.unwrap(kind.forward)


def difference(module: nn.Module, part: Part) -> str:
    """Run the module's class and its replacement; return how they differ, or an empty string."""
    kind, generator = type(module), torch.Generator().manual_seed(0)
    streams = torch.randn(2, TOKENS, _streams(module), CHANNELS, generator=generator)
    rest = {name: object() for name in (*part.arguments[1:], "probe") if name != "kwargs"}
    if not part.is_layer:
        rest = {}
    results = []
    with torch.no_grad(), autocast_off("cpu"):
        for forward, accelerated in (
            (original_forward(kind), False),
            (part.forward, True),
        ):
            calls: Calls = []
            small = _small(module, accelerated, calls, torch.Generator().manual_seed(1))
            results.append((_tensors(forward(small, streams, **rest)), calls))
    (wanted, wanted_calls), (found, found_calls) = results
    if not _close(found, wanted):
        return "its results differ"
    if not _same_calls(found_calls, wanted_calls):
        return "it calls its submodules in another way"
    return ""


class StandIn(nn.Module):
    """Submodule of a layer that scales its input and records its call."""

    def __init__(self, name: str, factor: float, calls: Calls, result: Callable[[Tensor], Any]):
        """factor: distinguishes the submodules; result: form of the output."""
        super().__init__()
        self.name, self.factor, self.calls, self.result = name, factor, calls, result

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Scale the first tensor."""
        self.calls.append((self.name, args, kwargs))
        (u,) = [*args, *(kwargs[name] for name in ("hidden_states",) if name in kwargs)]
        return self.result(self.factor * u)


def _small(
    module: nn.Module, accelerated: bool, calls: Calls, generator: torch.Generator
) -> nn.Module:
    """Return a copy of the module without hooks, with random parameters for CHANNELS channels."""
    part, own = part_of(type(module)), copy(module)
    vars(own).update({name: {} for name, value in vars(module).items() if name.endswith("_hooks")})
    vars(own).pop("forward", None)
    if accelerated and part is not None:
        own.__class__ = accelerated_class(type(module), part, "reference")
    if part is None or not part.is_layer:
        vars(own)["_parameters"] = {
            name: nn.Parameter(_random(parameter, _streams(module), generator))
            for name, parameter in module.named_parameters(recurse=False)
        }
        return own
    vars(own)["_modules"] = dict(module._modules)
    for index, name in enumerate(sorted(part.children)):
        child = module.get_submodule(name)
        if name in ("attn_hc", "ffn_hc"):
            small = _small(child, accelerated, calls, generator)
        else:
            small = StandIn(name, 1.0 + index, calls, _result(module, name))
        own._modules[name] = small
    return own


def _result(layer: nn.Module, name: str) -> Callable[[Tensor], Any]:
    return (lambda y: attention_result(layer, y)) if name == "self_attn" else (lambda y: y)


def _random(parameter: Tensor, n: int, generator: torch.Generator) -> Tensor:
    shape = [*parameter.shape[:1], *[n * CHANNELS] * (parameter.ndim - 1)]
    return 0.5 * torch.randn(shape, generator=generator)


def _streams(module: Any) -> int:
    return int((module if hasattr(module, "hc_mult") else module.attn_hc).hc_mult)


def _tensors(result: Any) -> list[Tensor]:
    results = result if isinstance(result, tuple) else (result,)
    return [entry for entry in results if isinstance(entry, Tensor)]


def _close(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return len(found) == len(wanted) and all(
        own.shape == other.shape
        and bool((own - other).abs().max() <= TOLERANCE * other.abs().max())
        for own, other in zip(found, wanted, strict=True)
    )


def _same_calls(found: Calls, wanted: Calls) -> bool:
    """True if the names, the keywords and every argument but the tensors are the same."""
    return [_without_tensors(call) for call in found] == [_without_tensors(call) for call in wanted]


def _without_tensors(call: tuple[str, tuple[Any, ...], dict[str, Any]]) -> Any:
    name, args, kwargs = call
    values = {key: Tensor if isinstance(v, Tensor) else v for key, v in kwargs.items()}
    return name, len(args), values
