"""Forward and backward pass of random connections by a library's code, and by ours."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from manifold_hc import functional
from manifold_hc.bench.task import leaf
from manifold_hc.config import ConnectionConfig
from manifold_hc.connection import Connection
from manifold_hc.interop.layouts import LAYOUTS
from manifold_hc.stack import Stack
from manifold_hc.verify.observation import EXIT, Inputs, Streams
from manifold_hc.verify.references import Library, sort_names

CHANNELS = 24

SUBLAYERS = 2
"""One of each half of a layer."""


class Pass(NamedTuple):
    """Forward and backward pass of two sublayers and the exit, each on its own inputs."""

    outputs: list[Tensor]
    inputs: list[Tensor]
    """Gradients of x and y."""
    parameters: dict[str, Tensor]
    """Gradients by name."""


class Model(NamedTuple):
    """Connections in a library's layout, and their inputs."""

    config: ConnectionConfig
    tensors: dict[str, Tensor]
    """Parameters by their names in the layout."""
    inputs: dict[int, Streams]
    """Inputs of both sublayers and of the exit."""


def random_stack(config: ConnectionConfig, seed: int = 0) -> Stack:
    """Return connections with random parameters in float64 that have no symmetry.

    Logits have a standard deviation above 2, at which 20 iterations of Sinkhorn-Knopp have not
    converged and its two orders differ.
    """
    generator = torch.Generator().manual_seed(seed)
    stack = Stack(CHANNELS, config, SUBLAYERS)
    with torch.no_grad():
        for name, parameter in stack.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if name.endswith("phi"):
                values = values / parameter.shape[1] ** 0.5
            elif name.endswith("bias"):
                values = 2 * values
            parameter.copy_(1 + 0.1 * values if name.endswith("alpha") else values)
    return stack.double()


def run_models(library: Library, models: Sequence[Model]) -> list[Pass]:
    """Run the library's code forward and backward on every model."""
    return [_run_library(library, model) for model in models]


def _run_library(library: Library, model: Model) -> Pass:
    code = library.build(model.config, CHANNELS)
    leaves = {name: leaf(tensor) for name, tensor in model.tensors.items()}
    outputs, inputs, used = list[Tensor](), list[Tensor](), dict[str, Tensor]()
    names = sort_names(LAYOUTS[library.layout], leaves)
    for index, given in model.inputs.items():
        if index == EXIT and code.exit is None:
            continue
        own = {field: leaves[name] for field, name in names.get(index, {}).items()}
        used |= {name: leaves[name] for name in names.get(index, {}).values()}
        x = leaf(given.x)
        if given.y is None:
            assert code.exit is not None
            outputs.append(code.exit(own, x))
            inputs.append(x)
        else:
            y = leaf(given.y)
            found = code.sublayer(index, own, x, y)
            outputs += [found["u"], found["new"]]
            inputs += [x, y]
    return _backward(outputs, inputs, used)


def run_stack(stack: Stack, given: dict[int, Streams], exits: bool) -> Pass:
    """Run our connections forward and backward, and the exit too if `exits`."""
    outputs, inputs = list[Tensor](), list[Tensor]()
    for index, (first, second) in given.items():
        x = leaf(first.double())
        if second is None:
            if exits:
                outputs.append(stack.collapse(x))
                inputs.append(x)
            continue
        y = leaf(second.double())
        maps = cast(Connection, stack.connections[index]).maps
        # A Stack's first streams are equal and give res no gradient; these are not.
        maps.learn_res = True
        reading = maps(x)
        outputs += [reading.u, functional.write(x, y, reading.post, reading.res)]
        inputs += [x, y]
    used = {
        name: parameter
        for name, parameter in stack.named_parameters()
        if exits or not name.startswith("exit.")
    }
    return _backward(outputs, inputs, used)


def _backward(
    outputs: list[Tensor], inputs: list[Tensor], parameters: Mapping[str, Tensor]
) -> Pass:
    """Return the gradients for random cotangents; ones would hide Sinkhorn's gradient."""
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
    gradients = torch.autograd.grad(outputs, [*inputs, *parameters.values()], cotangents)
    count = len(inputs)
    named = dict(zip(parameters, gradients[count:], strict=True))
    return Pass([o.detach() for o in outputs], list(gradients[:count]), named)


def random_model(library: Library, stack: Stack) -> Model:
    """Return a stack's parameters in the library's layout and dtype, with random inputs."""
    native = {name: value.detach() for name, value in stack.state_dict().items()}
    tensors = LAYOUTS[library.layout].from_native(native)
    given = Inputs(8, stack.config.n, CHANNELS, dtype=library.precision)
    return Model(
        stack.config,
        {name: tensor.to(library.precision) for name, tensor in tensors.items()},
        {index: given.of(index) for index in (*range(SUBLAYERS), EXIT)},
    )
