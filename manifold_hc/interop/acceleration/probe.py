"""Comparison of transformers' forwards with ours, before one replaces the other.

A new version of transformers may change the equations of a class and keep its name. So every class
runs once on a few random numbers, by its own forward and by ours, with stand-ins for attention,
feed-forward and norms, and both must give the same and call the stand-ins in the same way.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from manifold_hc.interop.acceleration.classes import accelerated_class
from manifold_hc.interop.acceleration.parts import (
    Part,
    attention_result,
    original_forward,
    part_of,
)
from manifold_hc.precision import autocast_off

TOLERANCE = 1e-4
"""Largest difference, relative to the largest entry; both compute in float32."""

TOKENS, CHANNELS = 3, 4

CONNECTIONS = ("attn_hc", "ffn_hc")
"""Submodules of a layer that are connections."""

Calls = list[tuple[str, int, dict[str, Any]]]
"""Name of a stand-in, number of its positional arguments, keywords without the tensors."""


def difference(module: nn.Module, part: Part) -> str:
    """Run the module's class and its replacement; return how they differ, or an empty string."""
    wanted, wanted_calls = _run(original_forward(type(module)), module, part, accelerated=False)
    found, found_calls = _run(part.forward, module, part, accelerated=True)
    if not _close(found, wanted):
        return "its results differ"
    if found_calls != wanted_calls:
        return "it calls its submodules in another way"
    return ""


class StandIn(nn.Module):
    """Submodule of a layer that scales its input and records its call."""

    def __init__(
        self, name: str, factor: float, calls: Calls, result: Callable[[Tensor], Any]
    ) -> None:
        """factor: distinguishes the submodules; result: form of the output."""
        super().__init__()
        self.name, self.factor, self.calls, self.result = name, factor, calls, result

    def forward(self, *args: Tensor, **kwargs: Any) -> Any:
        """Scale the one tensor among the arguments; record the others."""
        others = {key: value for key, value in kwargs.items() if not isinstance(value, Tensor)}
        self.calls.append((self.name, len(args), others))
        (u,) = [*args, *(value for value in kwargs.values() if isinstance(value, Tensor))]
        return self.result(self.factor * u)


def _run(
    forward: Callable[..., Any], module: nn.Module, part: Part, accelerated: bool
) -> tuple[list[Tensor], Calls]:
    """Call a forward with a small copy of the module; return its tensors and the calls it makes."""
    calls: Calls = []
    names = [name for name in part.arguments[1:] if name != "kwargs"]
    # Names stand for the arguments that a layer hands to its branches, and for one without a name.
    rest = {name: name for name in (*names, "further")} if part.is_layer else {}
    with torch.no_grad(), torch.device("cpu"), autocast_off("cpu"):
        streams = _draw((2, TOKENS, _streams(module), CHANNELS), _seeded(0))
        small = _small(module, accelerated, calls, _seeded(1))
        return _tensors(forward(small, streams, **rest)), calls


def _small(
    module: nn.Module, accelerated: bool, calls: Calls, generator: torch.Generator
) -> nn.Module:
    """Return a copy of the module without hooks, with random parameters for CHANNELS channels."""
    part, own = part_of(type(module)), object.__new__(type(module))
    hooks: dict[str, Any] = {name: {} for name in vars(module) if name.endswith("_hooks")}
    vars(own).update(vars(module) | hooks)
    vars(own).pop("forward", None)
    if accelerated and part is not None:
        own.__class__ = accelerated_class(type(module), part, "reference")
    if part is None or not part.is_layer:
        parameters = module.named_parameters(recurse=False)
        vars(own)["_parameters"] = {
            name: nn.Parameter(_random(parameter, _streams(module), generator))
            for name, parameter in parameters
        }
        return own
    children: dict[str, nn.Module] = {}
    for index, name in enumerate(sorted(part.children)):
        if name in CONNECTIONS:
            connection = _connection(module.get_submodule(name))
            children[name] = _small(connection, accelerated, calls, generator)
        else:
            children[name] = StandIn(name, 1.0 + index, calls, _result(module, name))
    vars(own)["_modules"] = children
    return own


def _connection(module: nn.Module) -> nn.Module:
    """Return the connection of a layer, or the one inside a module that wraps it, as PEFT's do."""
    return next(inner for inner in module.modules() if part_of(type(inner)) is not None)


def _result(layer: nn.Module, name: str) -> Callable[[Tensor], Any]:
    return (lambda y: attention_result(layer, y)) if name == "self_attn" else (lambda y: y)


def _random(parameter: Tensor, n: int, generator: torch.Generator) -> Tensor:
    shape = [*parameter.shape[:1], *[n * CHANNELS] * (parameter.ndim - 1)]
    return 0.5 * _draw(shape, generator)


def _draw(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Draw on the CPU in float32, whatever the defaults are while a model is built."""
    return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def _streams(module: nn.Module) -> int:
    connection = module if hasattr(module, "hc_mult") else module.get_submodule(CONNECTIONS[0])
    return int(_connection(connection).hc_mult)  # type: ignore[arg-type]


def _tensors(result: Any) -> list[Tensor]:
    results = result if isinstance(result, tuple) else (result,)
    return [entry for entry in results if isinstance(entry, Tensor)]


def _close(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return len(found) == len(wanted) and all(
        own.shape == other.shape
        and bool((own - other).abs().max() <= TOLERANCE * other.abs().max())
        for own, other in zip(found, wanted, strict=True)
    )
