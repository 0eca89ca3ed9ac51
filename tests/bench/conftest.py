"""Invented measurements."""

import pytest

from manifold_hc.bench.ops import OpsResult, Row
from manifold_hc.bench.problem import Problem
from manifold_hc.bench.step import ANY, MHC, RESIDUAL, STREAMS, Part, StepResult


def timed_row(name, seconds, *, ours=False, compiled=False, state="timed"):
    halves = [s / 2 for s in seconds]
    return Row(name, ours, compiled, state=state, forward=halves, backward=halves)


@pytest.fixture
def ops_result():
    rows = [
        timed_row("cpu", [1.0, 2.0, 9.0], ours=True),
        timed_row("reference", [4.0, 4.0, 4.0], ours=True),
        timed_row("eager", [9.0, 10.0, 11.0]),
        timed_row("eager, compiled", [5.0, 5.0, 5.0], compiled=True),
        timed_row("wrong but fast", [0.1, 0.1, 0.1], state="wrong"),
    ]
    return OpsResult(Problem(), 1e9, 10, 20, rows, [], False, {})


def part(name, kind, times, totals):
    return Part(name, kind, float(times), forward=totals, backward=[0.0] * len(totals))


@pytest.fixture
def step_result():
    found = StepResult("made", Problem(), 1000)
    found.parts = [
        part("embedding", ANY, 1, [1.0]),
        part("head and loss", ANY, 1, [5.0]),
        part("entry and exit", STREAMS, 1, [0.5]),
        part("dense block", RESIDUAL, 1, [2.0, 4.0, 8.0]),
        part("dense block", MHC, 1, [2.5, 6.0, 8.5]),  # adds 0.5, 2, 0.5
        part("expert block 1", RESIDUAL, 5.5, [4.0]),
        part("expert block 1", MHC, 5.5, [5.0]),
        part("expert block 2", RESIDUAL, 5.5, [4.0]),
        part("expert block 2", MHC, 5.5, [7.0]),
        part("optimizer", ANY, 10, [2.0]),
    ]
    return found
