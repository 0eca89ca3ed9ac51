"""`mhc bench ops`: one connection by every implementation there is."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Literal

from manifold_hc.bench import peers
from manifold_hc.bench.boundaries import BoundaryRow, bench_boundaries
from manifold_hc.bench.correctness import check
from manifold_hc.bench.measure.bandwidth import bound_bytes, copy_bandwidth
from manifold_hc.bench.measure.graphs import graphed
from manifold_hc.bench.measure.memory import cost
from manifold_hc.bench.measure.timing import Run, first_call, measure, thread_counts, timed
from manifold_hc.bench.operators import OperatorRow, bench_operators
from manifold_hc.bench.peers.implementations import Candidate, compiled, ours, quiet, serving
from manifold_hc.bench.problem import Inputs, Problem

State = Literal["timed", "wrong", "missing"]


@dataclass
class Row:
    """One implementation. Without `state` "timed" it has no figures."""

    implementation: str
    ours: bool
    compiled: bool
    version: str | None = None
    note: str = ""
    """How its mathematics differs."""
    state: State = "missing"
    reason: str = ""
    """Why it was not timed."""
    error: float | None = None
    """Largest relative error against float64."""
    tolerance: float | None = None
    forward: list[float] = field(default_factory=list)
    """Seconds of every sample, and so `backward`."""
    backward: list[float] = field(default_factory=list)
    threads: int | None = None
    graphed: bool = False
    """Whether CUDA graphs replayed it."""
    first_call: float | None = None
    """Seconds of the first forward and backward pass."""
    extra_bytes: int | None = None
    """Peak of allocations beyond x, y, u, x' and their gradients."""
    forward_launches: int | None = None
    backward_launches: int | None = None

    @property
    def totals(self) -> list[float]:
        """Seconds of forward and backward, sample by sample."""
        return [a + b for a, b in zip(self.forward, self.backward, strict=True)]

    @property
    def total(self) -> float:
        """Median seconds."""
        return median(self.totals)


@dataclass
class OpsTable:
    """Everything measured at one size and dtype."""

    problem: Problem
    copy_bandwidth: float
    """Bytes a second, read and written."""
    forward_bytes: int
    """Bound of METHOD's accounting: (4n + 2) C elements a token."""
    backward_bytes: int
    """(5n + 3) C elements a token."""
    rows: list[Row]
    operators: list[OperatorRow]
    eager_only: bool
    """Whether nothing was compiled."""
    refused: dict[str, str]
    """Backends that do not serve this device and dtype, and why."""
    boundaries: list[BoundaryRow] = field(default_factory=list)
    """Runs of sublayers by our fastest backend."""

    @property
    def ours(self) -> Row | None:
        """The fastest of our own backends."""
        return fastest(row for row in self.rows if row.ours)

    @property
    def fastest_peer(self) -> Row | None:
        """Compiled ones included, that of our own reference too."""
        return fastest(row for row in self.rows if not row.ours)

    @property
    def fastest_eager_peer(self) -> Row | None:
        """Without torch.compile."""
        return fastest(row for row in self.rows if not row.ours and not row.compiled)


def fastest(rows: Iterator[Row]) -> Row | None:
    """The timed row with the smallest median; None where there is none."""
    return min((row for row in rows if row.state == "timed"), key=lambda r: r.total, default=None)


def bench_ops(
    problem: Problem, rounds: int, eager_only: bool, say: Callable[[str], None]
) -> OpsTable:
    """Gate, count and time every implementation; `say` is told what is next.

    Rows of peers that are missing or wrong stay in the table, without figures.
    """
    bandwidth = copy_bandwidth(problem.device)
    inputs = problem.inputs()
    backends, refused = serving(problem)
    rows, runs = [], []
    for row, build in _contenders(problem, inputs, backends, eager_only):
        say(f"{problem.dtype}: {row.implementation}")
        if (run := _prepare(row, build, inputs)) is not None:
            runs.append((row, run))
        rows.append(row)
    say(f"{problem.dtype}: {rounds} rounds of all")
    _time(runs, rounds, problem.device)
    say(f"{problem.dtype}: operators")
    operators = bench_operators(problem, backends, rounds)
    say(f"{problem.dtype}: boundaries")
    boundaries = bench_boundaries(problem, backends[0], rounds)
    bound = bound_bytes(problem)
    return OpsTable(problem, bandwidth, *bound, rows, operators, eager_only, refused, boundaries)


Build = Callable[[], Candidate]


def _contenders(
    problem: Problem, inputs: Inputs, backends: Sequence[str], eager_only: bool
) -> Iterator[tuple[Row, Build]]:
    for backend in backends:
        yield Row(f"manifold-hc, {backend}", True, False), partial(ours, problem, inputs, backend)
    if not eager_only:
        build = partial(ours, problem, inputs, "reference")
        yield Row("manifold-hc, reference, compiled", False, True), partial(_compiled, build)
    for peer in peers.for_problem(problem):
        build = partial(peer.build, problem, inputs)
        yield Row(peer.package, False, False, peer.version), build
        if peer.compiles and not eager_only:
            name = f"{peer.package}, compiled"
            yield Row(name, False, True, peer.version), partial(_compiled, build)


def _compiled(build: Build) -> Candidate:
    return compiled(build())


def _prepare(row: Row, build: Build, inputs: Inputs) -> Run | None:
    """Fill in what is known before timing; None where there is nothing to time."""
    try:
        with quiet():
            candidate = build()
            row.note = candidate.note
            task = candidate.task(inputs)
            row.first_call = first_call(task.both)
            verdict = check(candidate, inputs)
    except Exception as error:  # somebody else's code may fail in any way: a row, not an end
        if row.ours:
            raise
        row.reason = _why(error, inputs.x.device.type)
        return None
    row.error, row.tolerance = verdict.error, verdict.tolerance
    if not verdict.ok:
        row.state, row.reason = "wrong", f"{verdict.worst} is off by {verdict.error:.1e}"
        return None
    with quiet():
        found = cost(candidate, inputs)
        replay = None if task.device.type == "cpu" else graphed(task)
    row.extra_bytes, row.forward_launches, row.backward_launches = found
    row.state, row.graphed = "timed", replay is not None
    return replay or timed(task)


def _why(error: Exception, device: str) -> str:
    if isinstance(error, ImportError):
        extra = "bench" if device == "cpu" else "bench-gpu"
        return f"{error}; pip install 'manifold-hc[{extra}]'"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _time(runs: Sequence[tuple[Row, Run]], rounds: int, device: str) -> None:
    threads = [thread_counts(device, row.compiled) for row, _ in runs]
    timings = measure([run for _, run in runs], threads, rounds)
    for (row, _), timing in zip(runs, timings, strict=True):
        row.threads = timing.threads
        row.forward = [sample.forward for sample in timing.samples]
        row.backward = [sample.backward for sample in timing.samples]
