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
from manifold_hc.bench.task import call


@dataclass
class OperatorRow(Timing):
    """One operator on one backend."""

    operator: str
    backend: str


def bench_operators(problem: Problem, backends: Sequence[str], rounds: int) -> list[OperatorRow]:
    """Time every operator on every backend; the backends take turns."""
    rows, threads = [], [thread_counts(problem.device)] * len(backends)
    for operator, (function, tensors) in _calls(problem).items():
        turns = [
            (OperatorRow(operator, each), timed(call(partial(function, backend=each), tensors)))
            for each in backends
        ]
        measure(turns, rounds, threads)
        rows += [row for row, _ in turns]
    return rows


def operators_sheet(rows: Sequence[OperatorRow]) -> Sheet:
    """One row for each operator, one column for each backend."""
    backends = list(dict.fromkeys(row.backend for row in rows))
    seconds: dict[str, list[float]] = {}
    for row in rows:
        seconds.setdefault(row.operator, []).append(row.total)
    return Sheet(
        "Operators, forward and backward",
        ["operator", *(f"{backend} ms" for backend in backends)],
        [[name, *(f"{1e3 * each:.3g}" for each in totals)] for name, totals in seconds.items()],
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
