"""One connection by one implementation: our backends, a peer, or either through torch.compile."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from manifold_hc.bench.problem import Inputs, Problem, reference_step
from manifold_hc.bench.task import Task, leaf
from manifold_hc.connection import Branch, Connection
from manifold_hc.errors import BackendError
from manifold_hc.kernels import backends

Connect = Callable[[Tensor, Branch], Tensor]
"""(streams x [1, N, n, C], branch) -> x' [1, N, n, C]."""

Connected = tuple[Connect, tuple[Tensor, ...]]
"""A connection and its parameters."""

Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(streams x [1, N, n, C], branch output y [1, N, C]) -> (u [1, N, C], x' [1, N, n, C])."""

Oracle = Callable[..., tuple[Tensor, Tensor]]
"""(x, y, *parameters) -> (u, x'): the implementation's equations in any dtype."""


@dataclass(frozen=True)
class Implementation:
    """A connection with its parameters loaded."""

    step: Step
    """One forward pass with the branch's output given."""
    parameters: tuple[Tensor, ...]
    """Leaves whose gradients the backward pass computes."""
    oracle: Oracle
    compiled: bool = False
    """True if torch.compile generates its code."""

    def task(self, inputs: Inputs) -> Task:
        """Return one pass over these inputs."""
        x, y = leaf(inputs.x), leaf(inputs.y)
        cotangents = (inputs.grad_u, inputs.grad_new)
        return Task(lambda: self.step(x, y), (x, y, *self.parameters), cotangents)

    def oracle_task(self, inputs: Inputs) -> Task:
        """Return the same pass by the oracle in float64."""
        x, y, *parameters = (leaf(t.double()) for t in (inputs.x, inputs.y, *self.parameters))
        cotangents = (inputs.grad_u.double(), inputs.grad_new.double())
        return Task(lambda: self.oracle(x, y, *parameters), (x, y, *parameters), cotangents)

    def compile(self) -> "Implementation":
        """Return it compiled for the shapes of its first call."""
        step: Any = torch.compile(self.step, dynamic=False)
        return replace(self, step=step, compiled=True)


def ours(problem: Problem, inputs: Inputs, backend: str) -> Implementation:
    """Build our connection on one backend."""
    connection = Connection(problem.channels, problem.connection(backend)).to(problem.device)
    load(connection.maps, phi=inputs.phi, alpha=inputs.alpha, bias=inputs.bias)
    return Implementation(
        step=without_branch(connection),
        parameters=tuple(map(connection.maps.get_parameter, ("phi", "alpha", "bias"))),
        oracle=partial(reference_step, numerics=problem.numerics),
    )


def without_branch(connect: Connect) -> Step:
    """Replace the branch by a given output y, so that only the connection is left."""

    def step(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        read: list[Tensor] = []

        def branch(u: Tensor) -> Tensor:
            read.append(u)
            return y

        new = connect(x, branch)
        return read[0], new

    return step


def supported_backends(problem: Problem) -> tuple[list[str], dict[str, str]]:
    """Return the backends that run at this device and dtype, and why each other one does not."""
    supported, refused = [], {}
    small = replace(problem, tokens=2, channels=16)
    inputs = small.inputs()
    for backend in backends():
        try:
            with torch.no_grad():
                ours(small, inputs, backend).step(inputs.x, inputs.y)
            supported.append(backend)
        except BackendError as error:
            refused[backend] = str(error)
    return supported, refused


def load(module: torch.nn.Module, **tensors: Tensor) -> None:
    """Copy tensors into the module's parameters of these names."""
    with torch.no_grad():
        for name, tensor in tensors.items():
            module.get_parameter(name).copy_(tensor)
