"""The functional operators one by one: each backend against the reference."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from manifold_hc import functional
from manifold_hc.bench.measure.timing import Timing, measure, thread_counts, timed
from manifold_hc.bench.output.sheet import Sheet
from manifold_hc.bench.problem import Problem
from manifold_hc.bench.task import Task, leaf


@dataclass
class OperatorRow(Timing):
    """One operator on one backend."""

    operator: str
    backend: str


def bench_operators(problem: Problem, backends: Sequence[str], rounds: int) -> list[OperatorRow]:
    """Time every operator on every backend; the backends take turns."""
    rows = []
    for operator, (function, tensors) in _calls(problem).items():
        own = [OperatorRow(operator, backend) for backend in backends]
        runs = [timed(_task(partial(function, backend=row.backend), tensors)) for row in own]
        measure(own, runs, rounds, [thread_counts(problem.device)] * len(runs))
        rows += own
    return rows


def operators_sheet(rows: Sequence[OperatorRow]) -> Sheet:
    """One row for each operator, one column for each backend."""
    backends = list(dict.fromkeys(row.backend for row in rows))
    seconds = {(row.operator, row.backend): row.total for row in rows}
    return Sheet(
        "Operators, forward and backward",
        ["operator", *(f"{backend} ms" for backend in backends)],
        [
            [operator, *(f"{1e3 * seconds[operator, backend]:.3g}" for backend in backends)]
            for operator in dict.fromkeys(row.operator for row in rows)
        ],
    )


def _calls(problem: Problem) -> dict[str, tuple[Callable[..., Any], list[Tensor]]]:
    """Each operator with its tensor arguments."""
    n, inputs = problem.streams, problem.inputs()

    def random(*shape: int) -> Tensor:
        return torch.randn(1, problem.tokens, *shape, device=problem.device)

    pre, post, res = random(n).softmax(-1), random(n).softmax(-1), random(n, n).softmax(-1)
    coefficients = partial(functional.coefficients, numerics=problem.numerics)
    return {
        "sinkhorn": (partial(functional.sinkhorn, numerics=problem.numerics), [random(n, n)]),
        "coefficients": (coefficients, [inputs.x, inputs.phi, inputs.alpha, inputs.bias]),
        "read": (functional.read, [inputs.x, pre]),
        "write": (functional.write, [inputs.x, inputs.y, post, res]),
    }


def _task(function: Callable[..., Any], tensors: Sequence[Tensor]) -> Task:
    """One call with random cotangents."""
    leaves = tuple(map(leaf, tensors))

    def forward() -> tuple[Tensor, ...]:
        result = function(*leaves)
        return result if isinstance(result, tuple) else (result,)

    with torch.no_grad():
        cotangents = tuple(torch.randn_like(output) for output in forward())
    return Task(forward, leaves, cotangents)
