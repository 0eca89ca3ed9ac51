"""The functional operators one by one, a backend against the reference."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from manifold_hc import functional
from manifold_hc.bench.measure.timing import measure, thread_counts, timed
from manifold_hc.bench.problem import Problem
from manifold_hc.bench.task import Task, leaf


@dataclass
class OperatorRow:
    """One operator by one backend."""

    operator: str
    backend: str
    forward: list[float]
    """Seconds of every sample, and so `backward`."""
    backward: list[float]
    threads: int

    @property
    def total(self) -> float:
        """Median seconds of both."""
        return median(a + b for a, b in zip(self.forward, self.backward, strict=True))


def bench_operators(problem: Problem, backends: Sequence[str], rounds: int) -> list[OperatorRow]:
    """Every operator by every backend; the backends take turns."""
    rows = []
    for operator, build in OPERATORS.items():
        runs = [timed(build(problem, backend)) for backend in backends]
        threads = [thread_counts(problem.device)] * len(runs)
        for backend, timing in zip(backends, measure(runs, threads, rounds), strict=True):
            forward = [sample.forward for sample in timing.samples]
            backward = [sample.backward for sample in timing.samples]
            rows.append(OperatorRow(operator, backend, forward, backward, timing.threads))
    return rows


def _sinkhorn(problem: Problem, backend: str) -> Task:
    n = problem.streams
    logits = leaf(torch.randn(problem.tokens, n, n, device=problem.device))
    return _task(
        lambda: (functional.sinkhorn(logits, numerics=problem.numerics, backend=backend),), logits
    )


def _coefficients(problem: Problem, backend: str) -> Task:
    inputs = problem.inputs()
    leaves = [leaf(t) for t in (inputs.x, inputs.phi, inputs.alpha, inputs.bias)]
    return _task(
        lambda: functional.coefficients(*leaves, numerics=problem.numerics, backend=backend),
        *leaves,
    )


def _read(problem: Problem, backend: str) -> Task:
    x, pre = leaf(problem.inputs().x), leaf(_weights(problem, problem.streams))
    return _task(lambda: (functional.read(x, pre, backend),), x, pre)


def _write(problem: Problem, backend: str) -> Task:
    n, inputs = problem.streams, problem.inputs()
    x, y = leaf(inputs.x), leaf(inputs.y)
    post, res = leaf(_weights(problem, n)), leaf(_weights(problem, n, n))
    return _task(lambda: (functional.write(x, y, post, res, backend),), x, y, post, res)


OPERATORS: dict[str, Callable[[Problem, str], Task]] = {
    "sinkhorn": _sinkhorn,
    "coefficients": _coefficients,
    "read": _read,
    "write": _write,
}


def _weights(problem: Problem, *shape: int) -> Tensor:
    """Coefficients of every token whose rows sum to 1."""
    return torch.randn(1, problem.tokens, *shape, device=problem.device).softmax(-1)


def _task(forward: Callable[[], tuple[Tensor, ...]], *leaves: Tensor) -> Task:
    with torch.no_grad():
        cotangents = tuple(torch.randn_like(output) for output in forward())
    return Task(forward, leaves, cotangents)
