"""`accelerate` and the handle that takes it back."""

import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn

from manifold_hc.errors import BackendError, ConfigError
from manifold_hc.interop.acceleration import probe
from manifold_hc.interop.acceleration.classes import (
    accelerated_class,
    change_class,
    has_own_forward,
    is_accelerated,
    replaced_class,
)
from manifold_hc.interop.acceleration.parts import (
    MODEL_TYPES,
    REFUSED,
    TESTED,
    Part,
    arguments_of,
    original_forward,
    part_of,
)
from manifold_hc.kernels import BACKENDS
from manifold_hc.known_forwards import is_original_forward


class Acceleration:
    """Modules of a model that run our operators; `remove` gives them their own forward again.

    As a context manager, it removes itself at the end of the block.

    Args:
        modules: Accelerated modules by their name in the model.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        """Take the modules; `accelerate` makes the handle."""
        self.modules = dict(modules)

    @classmethod
    def of(cls, model: nn.Module) -> "Acceleration":
        """Return the handle of a model that is accelerated already, such as a copy or a pickle.

        Raises ConfigError if no module of the model is accelerated.
        """
        found = {name: m for name, m in model.named_modules() if is_accelerated(m)}
        if not found:
            raise ConfigError(
                f"Acceleration.of: no module of {type(model).__name__} is accelerated; "
                "call accelerate(model)"
            )
        return cls(found)

    def remove(self) -> None:
        """Give every module its class back, which leaves no trace; a second call does nothing.

        Raises ConfigError, and changes nothing, if a module's class was changed since.
        """
        for name, module in self.modules.items():
            if replaced_class(module) is None:
                raise ConfigError(
                    f"Acceleration.remove: {name} must have the class that accelerate gave it but "
                    f"has {type(module).__name__}; undo later changes, as of fully_shard, first"
                )
        for module in self.modules.values():
            if (kind := replaced_class(module)) is not None:
                change_class(module, kind)
        self.modules = {}

    def __len__(self) -> int:
        """Number of accelerated modules."""
        return len(self.modules)

    def __enter__(self) -> "Acceleration":
        """Return the handle."""
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the acceleration."""
        self.remove()

    def __repr__(self) -> str:
        """Number of modules of every class."""
        counts = Counter(type(module).__name__ for module in self.modules.values())
        parts = ", ".join(f"{count} {name}" for name, count in counts.items())
        return f"Acceleration({parts or 'removed'})"


def accelerate(model: nn.Module, backend: str = "auto") -> Acceleration:
    """Run the hyper-connections of a transformers model by this package's operators.

    Layers, connections and the learned exit of the models `deepseek_v4` (arXiv 2606.19348),
    `glm5_next` and `hy_v4` get another forward. Parameters, their names, hooks and files stay:
    `save_pretrained` writes the same bytes. Coefficients are computed and applied in float32, where
    transformers rounds them to the streams' dtype.

    Args:
        model: A model of transformers, or any module that contains one.
        backend: See `manifold_hc.functional`.

    Returns:
        Handle with the accelerated modules; `handle.remove()` undoes the call.

    Raises:
        ConfigError: The model is not a module or has none of these, or is accelerated already, or
            a module has a forward of its own, or computes something else than in the versions of
            transformers that were tested. The model is unchanged.
        BackendError: This version has no such backend.

    Example:
        >>> from transformers import DeepseekV4Config
        >>> from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperHead
        >>> from manifold_hc.interop import accelerate
        >>> head = DeepseekV4HyperHead(DeepseekV4Config(hidden_size=8, num_hidden_layers=1))
        >>> handle = accelerate(head)
        >>> handle
        Acceleration(1 DeepseekV4HyperHead)
        >>> handle.remove()
    """
    if backend not in ("auto", *BACKENDS):
        raise BackendError(
            f"accelerate: backend must be one of auto, {', '.join(BACKENDS)} but is {backend!r}"
        )
    _require_module(model)
    found = _known_modules(model)
    for name, module, part in found:
        _require_plain(name, module, part)
    kinds = {_kind(module): (module, part) for _, module, part in found}
    # Connections before the layers that hold them, so that an error names the class that differs.
    for module, part in sorted(kinds.values(), key=lambda kind: kind[1].is_layer):
        _require_same_equations(module, part)
    for _, module, part in found:
        change_class(module, accelerated_class(type(module), part, backend))
    return Acceleration({name: module for name, module, _ in found})


def _require_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        given = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise ConfigError(
            f"accelerate: model must be a torch.nn.Module but is {given}; load it first"
        )


def _known_modules(model: nn.Module) -> list[tuple[str, nn.Module, Part]]:
    found = []
    for name, module in model.named_modules():
        if is_accelerated(module):
            raise ConfigError(
                f"accelerate: {name or type(module).__name__} is accelerated already; "
                "Acceleration.of(model) is its handle"
            )
        if part := part_of(type(module)):
            found.append((name or part.name, module, part))
    if not found:
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        reason = f", {REFUSED[kind]}" if kind in REFUSED else ""
        raise ConfigError(
            "accelerate: wanted a model of transformers with hyper-connections "
            f"({', '.join(MODEL_TYPES)}) but got {kind}{reason}; a model of your own takes "
            "mhc.Connection"
        )
    return found


def _require_plain(name: str, module: nn.Module, part: Part) -> None:
    """Raise ConfigError if the module's forward is not that of its class in transformers."""
    kind = next(base for base in type(module).__mro__ if part.is_class(base))
    own = original_forward(type(module))
    if has_own_forward(module) or not is_original_forward(kind, own):
        raise ConfigError(
            f"accelerate: {name} must have the forward of {part.name} but has another one, "
            "patched in or overridden; accelerate the model before it is patched"
        )


def _kind(module: nn.Module) -> tuple[Any, ...]:
    """Class of a module, and of a layer's attention, on which the layer's forward depends."""
    return type(module), type(getattr(module, "self_attn", None))


def _require_same_equations(module: nn.Module, part: Part) -> None:
    """Raise ConfigError if the installed transformers computes something else than we know."""
    if problem := _difference(module, part):
        version = getattr(sys.modules.get("transformers"), "__version__", "?")
        raise ConfigError(
            f"accelerate: {part.name} of transformers {version} is not the class that is known: "
            f"{problem}; install transformers {' or '.join(TESTED)}"
        )


def _difference(module: nn.Module, part: Part) -> str:
    """Return how the module's class differs from the part, or an empty string."""
    if (arguments := arguments_of(type(module))) != part.arguments:
        return f"its forward takes {', '.join(arguments)}"
    if children := part.children ^ set(module._modules):
        return f"it has other submodules, {', '.join(sorted(children))} first"
    try:
        return probe.difference(module, part)
    except Exception as error:  # transformers' code of another version may fail in any way
        return f"its forward failed with {type(error).__name__}: {error}"
