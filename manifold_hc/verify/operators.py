"""`mhc verify`: every operator on every backend, and every installed peer, against float64."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from manifold_hc.bench import peers
from manifold_hc.bench.correctness import TOLERANCE, Comparison, check, compare
from manifold_hc.bench.problem import DTYPES, Problem
from manifold_hc.bench.task import Task, leaf, quiet
from manifold_hc.errors import BackendError
from manifold_hc.kernels import backends
from manifold_hc.verify.cases import Case, cases

SHAPES = ((33, 4, 64), (5, 3, 7), (2, 1, 16), (17, 5, 40), (9, 8, 24), (7, 2, 33), (3, 16, 8))
"""(tokens, n, C): the usual one, then odd ones."""

WIDE = ("float64", "float32")
"""Dtypes that coefficients may have."""


@dataclass
class Line:
    """Result of one check."""

    name: str
    backend: str
    dtype: str
    state: Literal["ok", "FAILED", "not served", "not installed"]
    error: float | None = None
    """Relative error of the worst tensor of all shapes, outputs and gradients."""
    tolerance: float | None = None
    reason: str = ""


def verify(device: str, progress: Callable[[str], None]) -> Iterator[Line]:
    """Run all checks; yield one line for each as it ends."""
    for backend in backends():
        for dtype in DTYPES:
            for case in cases():
                if case.wide and dtype not in WIDE:
                    continue
                progress(f"{backend}, {dtype}: {case.name}")
                yield _check_case(case, backend, dtype, device)
    for dtype in ("float32", "bfloat16"):
        problem = Problem(tokens=64, channels=256, dtype=dtype, device=device)
        for peer in peers.for_problem(problem):
            progress(f"{peer.package}, {dtype}")
            yield _check_peer(peer, problem)


def _check_case(case: Case, backend: str, dtype: str, device: str) -> Line:
    def run() -> Comparison:
        found = []
        for index, (tokens, n, channels) in enumerate(SHAPES):
            if case.fits(n):
                torch.manual_seed(index)
                inputs = case.inputs(tokens, n, channels)
                given = [(t.to(device), has_stream_dtype) for t, has_stream_dtype in inputs]
                found.append(_compare(case, given, backend, DTYPES[dtype]))
        return max(found, key=lambda comparison: comparison.share)

    return _line(Line(case.name, backend, dtype, "not served"), run, BackendError)


def _check_peer(peer: peers.Peer, problem: Problem) -> Line:
    def run() -> Comparison:
        with quiet():
            inputs = problem.inputs()
            return check(peer.build(problem, inputs), inputs)

    name = f"peer {peer.package} {peer.version or ''}".strip()
    line = Line(name, "eager", problem.dtype, "not installed", reason=peer.note)
    return _line(line, run, ImportError)


def _line(line: Line, run: Callable[[], Comparison], refusal: type[Exception]) -> Line:
    """Fill in the result of `run`; the line keeps its state where `refusal` is raised."""
    try:
        comparison = run()
    except refusal as error:
        line.reason = str(error)
    except Exception as error:  # one operator or peer that breaks must not hide the others
        line.state, line.reason = "FAILED", f"{type(error).__name__}: {error}"
    else:
        line.state = "ok" if comparison.ok else "FAILED"
        line.error, line.tolerance = comparison.error, comparison.tolerance
    return line


def _compare(
    case: Case, given: Sequence[tuple[Tensor, bool]], backend: str, dtype: torch.dtype
) -> Comparison:
    """Compare outputs and gradients with the oracle; each has the tolerance of its own dtype.

    Coefficients and their gradients are float32 also where the streams are narrower.
    """
    wide = torch.promote_types(dtype, torch.float32)
    leaves = [leaf(t.to(dtype if has_stream_dtype else wide)) for t, has_stream_dtype in given]
    exact = [leaf(t.double()) for t in leaves]
    with torch.no_grad():
        outputs = _tuple(case.oracle(*exact))
        cotangents = tuple(torch.randn_like(o).to(dtype).double() for o in outputs)
    wanted = Task(lambda: _tuple(case.oracle(*exact)), tuple(exact), cotangents).tensors()
    run = partial(case.run, backend=backend)
    found = Task(lambda: _tuple(run(*leaves)), tuple(leaves), cotangents).tensors()
    least = 3 * TOLERANCE[dtype] if case.rounds else 0.0
    names = [""] * len(found)
    return compare(found, wanted, names, lambda tensor: max(least, TOLERANCE[tensor.dtype]))


def _tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)
