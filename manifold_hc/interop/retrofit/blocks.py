"""Blocks of a model that pass the streams on: the block's own class with another forward."""

import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from manifold_hc.config import ConnectionConfig
from manifold_hc.connection import Connection
from manifold_hc.errors import ConfigError, ShapeError
from manifold_hc.interop.retrofit.sublayers import (
    SublayerFunction,
    require_modules,
    require_no_arguments,
    takes_arguments,
)
from manifold_hc.stack import Stack, present

NAME = "hc_stack"
"""Name of the module in a block that holds the block's connections."""

STREAMS = "hc_streams"
"""Attribute of the tensors that blocks return: True for streams, False for the last hidden state.

Compiled blocks do not set it, and a tensor without it is judged by its shape alone.
"""


class StreamBlock:
    """Forward of a converted block: streams [B, T, n, C] in, streams out.

    The first block gets the embedding [B, T, C] and expands it; the last one returns the collapsed
    hidden state [B, T, C]. Blocks between them may be skipped or repeated.
    """

    original_class: ClassVar[type[nn.Module]]
    """Class of the block before the conversion."""
    argument_names: ClassVar[tuple[str, ...]]
    """Names of the block's positional arguments, the hidden state first."""
    hc_stack: Stack
    hc_sublayers: tuple[SublayerFunction, ...]
    hc_takes_arguments: bool
    """True if a branch gets the block's arguments other than the hidden state."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the block's branches inside its connections."""
        names = self.argument_names
        if len(args) > len(names):
            raise ShapeError(
                f"{type(self).__name__}: takes at most {len(names)} arguments "
                f"({', '.join(names)}) but got {len(args)}"
            )
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        x = arguments.pop(names[0])
        block = cast(nn.Module, self)
        if not self.hc_takes_arguments:
            require_no_arguments(block, arguments)
            arguments = {}
        branches = [partial(sublayer, block, **arguments) for sublayer in self.hc_sublayers]
        self._require_order(x)
        output = cast(Tensor, self.hc_stack(x, branches))
        if not torch.compiler.is_compiling():
            setattr(output, STREAMS, not self.hc_stack.ends)
        return output

    def _require_order(self, x: Tensor) -> None:
        """Raise ConfigError if the first block gets streams, or another block gets none."""
        stack = self.hc_stack
        channels = cast(Connection, next(iter(present(stack.connections)))).channels
        if stack.begins:
            wanted, wrong = "the embedding [..., C]", getattr(x, STREAMS, False)
        else:
            wanted = "the streams [..., n, C] of the block before it"
            wrong = x.shape[-2:] != (stack.config.n, channels) or not getattr(x, STREAMS, True)
        if wrong:
            place = "the first block" if stack.begins else "a block that is not the first"
            raise ConfigError(
                f"{type(self).__name__}: the blocks of a converted model must run in order, from "
                f"the first to the last: {place} must get {wanted} but got {list(x.shape)} with "
                f"n = {stack.config.n} and C = {channels}; change the model's loop"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the original class: the class of this block is made at run time."""
        return _empty_block, (self.original_class,), cast(Any, self).__getstate__()


@functools.cache
def stream_class(original: Any) -> Any:
    """Return the subclass of a block's class `original` with the forward of `StreamBlock`.

    It keeps the name, by which libraries find the blocks of a model.
    """
    parameters = list(inspect.signature(original.forward).parameters.values())[1:]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    body = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "original_class": original,
        "argument_names": tuple(p.name for p in parameters if p.kind in positional),
    }
    return type(original.__name__, (StreamBlock, original), body)


def _empty_block(original: Any) -> Any:
    kind = stream_class(original)
    return kind.__new__(kind)


def attach(
    blocks: Sequence[nn.Module], sublayers: tuple[SublayerFunction, ...], stack: Stack
) -> None:
    """Convert the blocks in place: each gets its part of the stack and the forward for it."""
    each = len(sublayers)
    block: Any
    for index, block in enumerate(blocks):
        part = stack.part(range(index * each, (index + 1) * each), owned=False)
        block.__class__ = stream_class(block.__class__)
        setattr(block, NAME, part.train(block.training))
        block.hc_sublayers = sublayers
        block.hc_takes_arguments = takes_arguments(sublayers)


@contextmanager
def detached_on_error(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Give blocks that `attach` has converted their own class back if the body raises."""
    try:
        yield
    except BaseException:
        block: Any
        for block in blocks:
            block.__class__ = block.original_class
            delattr(block, NAME)
            del block.hc_sublayers, block.hc_takes_arguments
        raise


def new_stack(
    blocks: Sequence[nn.Module], each: int, channels: int, config: ConnectionConfig
) -> Stack:
    """Return connections for `blocks` with `each` sublayers, every one on its block's device."""
    stack = Stack(channels, config, len(blocks) * each)
    for index, block in enumerate(blocks):
        if (own := next(block.parameters(), None)) is None:
            continue
        for connection in stack.connections[index * each : (index + 1) * each]:
            connection.to(own.device)
        if stack.exit is not None:
            stack.exit.to(own.device)
    return stack


def stream_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the converted blocks of a model by name, in depth order."""
    return {
        name: cast(nn.Module, module)
        for name, module in model.named_modules()
        if isinstance(module, StreamBlock)
    }


def connection_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of all connections, and of a learned exit, by name in the model."""
    return {
        f"{name}.{NAME}.{parameter}": tensor
        for name, block in stream_blocks(model).items()
        for parameter, tensor in block.get_submodule(NAME).named_parameters()
    }


def require_convertible(
    blocks: dict[str, nn.Module], sublayers: tuple[SublayerFunction, ...]
) -> None:
    """Raise ConfigError unless each block can get another forward and nothing else notices."""
    for name, block in blocks.items():
        _require_plain(name, block)
        require_modules(block, name, sublayers)
        if hasattr(block, NAME):
            raise ConfigError(
                f"convert: {name} must not have an attribute {NAME} of its own; rename it"
            )
    if len({id(block) for block in blocks.values()}) < len(blocks):
        raise ConfigError(
            "convert: every block must be a module of its own but two are the same; "
            "connections belong to one depth"
        )


def _require_plain(name: str, block: nn.Module) -> None:
    if "forward" in vars(block):
        raise ConfigError(
            f"convert: {name} must run the forward of {type(block).__name__} but has one of its "
            "own, as accelerate's device_map sets it; load the model without device_map, convert, "
            "then dispatch it"
        )
    hooks = (
        *block._forward_hooks.values(),
        *block._forward_pre_hooks.values(),
        *block._backward_hooks.values(),
        *block._backward_pre_hooks.values(),
    )
    for hook in hooks:
        if getattr(hook, "__module__", "") != "transformers.utils.output_capturing":
            raise ConfigError(
                f"convert: {name} must have no hooks but has "
                f"{getattr(hook, '__qualname__', hook)!r}, which would see streams [B, T, n, C]; "
                "remove it, and register it again after the conversion if it can take them"
            )
