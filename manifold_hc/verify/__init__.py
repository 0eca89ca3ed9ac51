"""`mhc verify`: every operator on every backend, and every installed peer, against float64."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from manifold_hc.bench import peers
from manifold_hc.bench.correctness import TOLERANCE, check, relative_error
from manifold_hc.bench.problem import DTYPES, Problem
from manifold_hc.bench.task import Task, leaf, quiet
from manifold_hc.errors import BackendError
from manifold_hc.kernels import backends
from manifold_hc.verify.cases import Case, cases

SHAPES = ((33, 4, 64), (5, 3, 7), (2, 1, 16), (17, 5, 40), (9, 8, 24), (7, 2, 33), (3, 16, 8))
"""(tokens, streams, channels): the common one, and odd ones."""

WIDE = ("float64", "float32")
"""Dtypes that coefficients may have."""


@dataclass
class Line:
    """One thing that was checked."""

    name: str
    backend: str
    dtype: str
    state: Literal["ok", "FAILED", "not served", "not installed"]
    error: float | None = None
    """Largest over shapes, outputs and gradients, as a share of the tensor's largest entry."""
    tolerance: float | None = None
    reason: str = ""


def verify(device: str, say: Callable[[str], None]) -> Iterator[Line]:
    """One line a check, as they are done."""
    for backend in backends():
        for dtype in DTYPES:
            for case in cases():
                if case.wide and dtype not in WIDE:
                    continue
                say(f"{backend}, {dtype}: {case.name}")
                yield _line(case, backend, dtype, device)
    for dtype in ("float32", "bfloat16"):
        problem = Problem(tokens=64, channels=256, dtype=dtype, device=device)
        for peer in peers.for_problem(problem):
            say(f"{peer.package}, {dtype}")
            yield _peer_line(peer, problem)


def _line(case: Case, backend: str, dtype: str, device: str) -> Line:
    found = []
    for index, (tokens, n, channels) in enumerate(SHAPES):
        if not case.fits(n):
            continue
        torch.manual_seed(index)
        given = [(t.to(device), narrow) for t, narrow in case.inputs(tokens, n, channels)]
        try:
            found.append(_worst(case, given, backend, DTYPES[dtype]))
        except BackendError as why:
            return Line(case.name, backend, dtype, "not served", reason=str(why))
        except Exception as why:  # one operator that breaks must not hide the others
            reason = f"{type(why).__name__}: {why}"
            return Line(case.name, backend, dtype, "FAILED", reason=reason)
    error, tolerance = max(found, key=_share)
    state: Literal["ok", "FAILED"] = "ok" if error <= tolerance else "FAILED"
    return Line(case.name, backend, dtype, state, error, tolerance)


def _worst(
    case: Case, given: Sequence[tuple[Tensor, bool]], backend: str, dtype: torch.dtype
) -> tuple[float, float]:
    """(error, tolerance) of the tensor that uses most of its own: each is held to its dtype's.

    Coefficients and their gradients are float32 also where the streams are narrower.
    """
    wide = torch.promote_types(dtype, torch.float32)
    mine = [leaf(t.to(dtype if narrow else wide)) for t, narrow in given]
    judged = [leaf(t.double()) for t in mine]
    with torch.no_grad():
        cotangents = [torch.randn_like(o).to(dtype).double() for o in _tuple(case.judge(*judged))]
    wanted = Task(lambda: _tuple(case.judge(*judged)), tuple(judged), tuple(cotangents))
    found = Task(lambda: _tuple(case.run(*mine, backend=backend)), tuple(mine), tuple(cotangents))
    least = 3 * TOLERANCE[dtype] if case.rounds else 0.0
    return max(
        (
            (relative_error(a, b), max(least, TOLERANCE[a.dtype]))
            for a, b in zip(found.tensors(), wanted.tensors(), strict=True)
        ),
        key=_share,
    )


def _share(found: tuple[float, float]) -> float:
    return found[0] / found[1]


def _peer_line(peer: peers.Peer, problem: Problem) -> Line:
    name, dtype = f"peer {peer.package} {peer.version or ''}".strip(), problem.dtype
    try:
        with quiet():
            inputs = problem.inputs()
            candidate = peer.build(problem, inputs)
            verdict = check(candidate, inputs)
    except ImportError as why:
        return Line(name, "eager", dtype, "not installed", reason=str(why))
    except Exception as why:  # somebody else's code may fail in any way
        reason = f"{type(why).__name__}: {why}"
        return Line(name, "eager", dtype, "FAILED", reason=reason)
    state: Literal["ok", "FAILED"] = "ok" if verdict.ok else "FAILED"
    error, tolerance = verdict.error, verdict.tolerance
    return Line(name, "eager", dtype, state, error, tolerance, candidate.note)


def _tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)
