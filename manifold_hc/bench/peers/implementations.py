"""What can be timed: our own backends, and whatever a peer brings, eager or compiled."""

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
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

Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(streams x [1, N, n, C], branch output y [1, N, C]) -> (u [1, N, C], x' [1, N, n, C])."""


@dataclass(frozen=True)
class Candidate:
    """One implementation of one connection, its parameters loaded."""

    name: str
    """As the tables print it."""
    connect: Connect
    """The connection around a branch."""
    step: Step
    """One forward pass with the branch left out."""
    parameters: tuple[Tensor, ...]
    """Leaves whose gradients its backward pass makes."""
    oracle: Callable[..., tuple[Tensor, Tensor]]
    """(x, y, *parameters) -> (u, x'), the same mathematics in any dtype."""
    ours: bool = False
    """Whether it is one of our backends."""
    compiled: bool = False
    """Whether torch.compile makes it."""
    note: str = ""
    """What differs from mHC as we compute it; empty where the mathematics is the same."""

    def task(self, inputs: Inputs) -> Task:
        """One pass over these inputs."""
        x, y = leaf(inputs.x), leaf(inputs.y)
        cotangents = (inputs.grad_u, inputs.grad_new)
        return Task(lambda: self.step(x, y), (x, y, *self.parameters), cotangents)

    def judge(self, inputs: Inputs) -> Task:
        """The same pass by the oracle in float64."""
        x, y, *parameters = (leaf(t.double()) for t in (inputs.x, inputs.y, *self.parameters))
        cotangents = (inputs.grad_u.double(), inputs.grad_new.double())
        return Task(lambda: self.oracle(x, y, *parameters), (x, y, *parameters), cotangents)


def ours(problem: Problem, inputs: Inputs, backend: str) -> Candidate:
    """Our connection by one backend."""
    connection = Connection(problem.channels, problem.connection(backend)).to(problem.device)
    parameters = tuple(connection.maps.get_parameter(name) for name in ("phi", "alpha", "bias"))
    with torch.no_grad():
        for parameter, value in zip(
            parameters, (inputs.phi, inputs.alpha, inputs.bias), strict=True
        ):
            parameter.copy_(value)
    return Candidate(
        name=f"manifold-hc, {backend}",
        connect=connection,
        step=without_branch(connection),
        parameters=parameters,
        oracle=partial(reference_step, numerics=problem.numerics),
        ours=True,
    )


def without_branch(connect: Connect) -> Step:
    """The same with y given: only the connection is left."""

    def step(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        read: list[Tensor] = []

        def branch(u: Tensor) -> Tensor:
            read.append(u)
            return y

        new = connect(x, branch)
        return read[0], new

    return step


def serving(problem: Problem) -> tuple[list[str], dict[str, str]]:
    """Backends that serve this device and dtype, and why the others do not."""
    found, refused = [], {}
    small = replace(problem, tokens=2, channels=16)
    inputs = small.inputs()
    for backend in backends():
        try:
            with torch.no_grad():
                ours(small, inputs, backend).step(inputs.x, inputs.y)
            found.append(backend)
        except BackendError as error:
            refused[backend] = str(error)
    return found, refused


def compiled(candidate: Candidate) -> Candidate:
    """The same through torch.compile, for these very shapes."""
    step: Any = torch.compile(candidate.step, dynamic=False)
    return replace(
        candidate, name=f"{candidate.name}, compiled", step=step, ours=False, compiled=True
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing that somebody else's code prints or warns of."""
    with (
        warnings.catch_warnings(action="ignore"),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        yield
