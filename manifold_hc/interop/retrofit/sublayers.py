"""Residual branches of a block, described by the names of its modules or by a function."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, cast

from torch import Tensor, nn

from manifold_hc.errors import ConfigError, ShapeError

SublayerFunction = Callable[..., Tensor]
"""Function (block, u, **arguments) -> y: one residual branch of a block, its norms inside.

u and y are [B, T, C]; the arguments are those that the model passes to the block, by name.
"""


@dataclass(frozen=True)
class Sublayer:
    """One residual branch `f` of `x = x + f(x)`: modules of a block, called one after another.

    Attributes:
        modules: Names of the block's modules or methods in the order of the calls: norm, branch,
            post-norm, dropout. Each takes one tensor; of a tuple that it returns the first element
            is used.
        arguments_to: Name of the one that gets the other arguments of the block (masks, positions,
            cache); None if there are none to pass on.
        scale: Name of the block's number that multiplies the output; None for 1.
    """

    modules: tuple[str, ...]
    arguments_to: str | None = None
    scale: str | None = None

    def __call__(self, block: nn.Module, u: Tensor, **arguments: Any) -> Tensor:
        """Run the branch of `block` on its input u [B, T, C]."""
        for name in self.modules:
            given = arguments if name == self.arguments_to else {}
            y = attrgetter(name)(block)(u, **given)
            u = y[0] if isinstance(y, tuple) else y
        return u if self.scale is None else u * attrgetter(self.scale)(block)


@dataclass(frozen=True)
class Parallel:
    """Branches that read the same streams and are written as one: `x = x + f(x) + g(x)`."""

    branches: tuple[Sublayer, ...]

    def __call__(self, block: nn.Module, u: Tensor, **arguments: Any) -> Tensor:
        """Return the sum of the branches of `block` on their input u [B, T, C]."""
        first, *others = (branch(block, u, **arguments) for branch in self.branches)
        return sum(others, start=first)


def as_sublayers(described: Sequence[Any]) -> tuple[SublayerFunction, ...]:
    """Return the branches that a user describes: tuples of names, single names, or functions.

    Raises:
        ConfigError: For an empty description or an entry of another type.
    """
    if isinstance(described, str) or not described:
        raise ConfigError(
            "convert: sublayers must be a list with one entry per residual branch, such as "
            f'[("ln_1", "attn"), ("ln_2", "mlp")], but is {described!r}'
        )
    return tuple(_as_sublayer(entry) for entry in described)


def _as_sublayer(entry: Any) -> SublayerFunction:
    if isinstance(entry, str):
        return Sublayer((entry,))
    if isinstance(entry, tuple | list) and entry and all(isinstance(name, str) for name in entry):
        return Sublayer(tuple(entry))
    if callable(entry):
        return cast(SublayerFunction, entry)
    raise ConfigError(
        "convert: an entry of sublayers must be a tuple of module names or a function "
        f"(block, u, **arguments) but is {entry!r}"
    )


def require_modules(block: nn.Module, name: str, sublayers: Sequence[SublayerFunction]) -> None:
    """Raise ConfigError if a block lacks a module that its description names."""
    for branch in branches_of(sublayers):
        for module in branch.modules:
            if not callable(_attribute(block, module)):
                known = ", ".join(child for child, _ in block.named_children())
                raise ConfigError(
                    f"convert: {name} must have the module {module!r}, named in its description, "
                    f"but {type(block).__name__} has {known}"
                )
        if branch.arguments_to is not None and branch.arguments_to not in branch.modules:
            raise ConfigError(
                f"convert: arguments_to must be one of {', '.join(branch.modules)} "
                f"but is {branch.arguments_to!r}"
            )


def require_complete(block: nn.Module, name: str, sublayers: Sequence[SublayerFunction]) -> None:
    """Raise ConfigError if parameters of a block are in no branch of its description.

    A function or a method may use any of them: a description with one passes.
    """
    branches = branches_of(sublayers)
    named = [_attribute(block, path) for branch in branches for path in branch.modules]
    modules = [module for module in named if isinstance(module, nn.Module)]
    if len(modules) < len(named) or any(_is_function(sublayer) for sublayer in sublayers):
        return
    used = {id(parameter) for module in modules for parameter in module.parameters()}
    used |= {id(_attribute(block, branch.scale)) for branch in branches if branch.scale}
    unused = [key for key, value in block.named_parameters() if id(value) not in used]
    if unused:
        owners = list(dict.fromkeys(_owner(key) for key in unused))
        raise ConfigError(
            f"convert: every parameter of {name} must belong to a described branch but "
            f"{', '.join(owners)} is in none; add it to sublayers, or describe the branch that "
            "uses it as a function (block, u, **arguments)"
        )


def _owner(parameter: str) -> str:
    """Return the path of the module that holds a parameter; the parameter's for the block's own."""
    return parameter.rpartition(".")[0] or parameter


def _is_function(sublayer: SublayerFunction) -> bool:
    return not isinstance(sublayer, Sublayer | Parallel)


def branches_of(sublayers: Sequence[SublayerFunction]) -> list[Sublayer]:
    """Return the branches that are described by names, those inside `Parallel` included."""
    found: list[Sublayer] = []
    for sublayer in sublayers:
        if isinstance(sublayer, Sublayer):
            found.append(sublayer)
        elif isinstance(sublayer, Parallel):
            found.extend(sublayer.branches)
    return found


def takes_arguments(sublayers: Sequence[SublayerFunction]) -> bool:
    """True if a branch gets the arguments that a model passes to its blocks."""
    return any(_is_function(sublayer) for sublayer in sublayers) or any(
        branch.arguments_to is not None for branch in branches_of(sublayers)
    )


def require_no_arguments(block: nn.Module, arguments: dict[str, Any]) -> None:
    """Raise ShapeError for arguments of a block that no described branch would get."""
    if given := [name for name, value in arguments.items() if value is not None]:
        raise ShapeError(
            f"{type(block).__name__}: no described branch takes {', '.join(given)}; describe the "
            "one that does as Sublayer(..., arguments_to=NAME) or as a function "
            "(block, u, **arguments)"
        )


def _attribute(block: nn.Module, path: str) -> object:
    try:
        return attrgetter(path)(block)
    except AttributeError:
        return None
