"""`mhc bench ops`: one connection by every implementation that runs on the device."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from manifold_hc.bench import peers
from manifold_hc.bench.boundaries import BoundaryRow, bench_boundaries, boundaries_sheet
from manifold_hc.bench.correctness import check
from manifold_hc.bench.measure.bandwidth import bound_bytes, copy_bandwidth
from manifold_hc.bench.measure.graphs import graphed
from manifold_hc.bench.measure.memory import cost
from manifold_hc.bench.measure.timing import Run, Timing, first_call, measure, thread_counts, timed
from manifold_hc.bench.operators import OperatorRow, bench_operators, operators_sheet
from manifold_hc.bench.output.sheet import NONE, Sheet, milliseconds, quartiles, samples
from manifold_hc.bench.peers.implementations import (
    Implementation,
    compiled,
    ours,
    supported_backends,
)
from manifold_hc.bench.problem import Inputs, Problem
from manifold_hc.bench.task import quiet

LEGEND = (
    "quartiles: of the total, in ms; GB/s, % of copy (share of the copy bandwidth) and launches: "
    "forward / backward; x bound: total over the time that the bound's bytes take at copy "
    "bandwidth; memory: peak of allocations beyond x, y, u, x' and their gradients, in sizes of "
    "the streams; launches: {launches}; first s: first forward and backward pass; x ours: total "
    "over that of our fastest backend."
)

LAUNCHES = {"cpu": "operators run, views left out, unknown inside compiled code", "cuda": "kernels"}


@dataclass
class Row(Timing):
    """One implementation. It has figures only in state "timed"."""

    implementation: str
    ours: bool
    """True for our backends, false for peers and compiled code."""
    compiled: bool
    version: str | None = None
    note: str = ""
    """How its equations differ from ours."""
    state: Literal["timed", "wrong", "missing"] = "missing"
    reason: str = ""
    """Why it was not timed."""
    error: float | None = None
    """Largest relative error against float64."""
    tolerance: float | None = None
    graphed: bool = False
    """True if CUDA graphs replay it."""
    first_call: float | None = None
    """Seconds of the first forward and backward pass."""
    extra_bytes: int | None = None
    """Peak of allocations beyond x, y, u, x' and their gradients."""
    forward_launches: int | None = None
    backward_launches: int | None = None


@dataclass
class OpsResult:
    """Figures of one size and dtype."""

    problem: Problem
    copy_bandwidth: float
    """Bytes per second, read and written."""
    forward_bytes: int
    """Bytes that forward must move: (4n + 2) C elements per token."""
    backward_bytes: int
    """Bytes that backward must move: (5n + 3) C elements per token."""
    rows: list[Row]
    operators: list[OperatorRow]
    eager_only: bool
    """True if nothing was compiled."""
    refused: dict[str, str]
    """Backends that do not support this device and dtype, with the reason."""
    boundaries: list[BoundaryRow] = field(default_factory=list)
    """Runs of sublayers on our first supported backend."""

    @property
    def ours(self) -> Row | None:
        """The fastest of our backends."""
        return fastest(row for row in self.rows if row.ours)

    @property
    def fastest_peer(self) -> Row | None:
        """The fastest other row, compiled ones included, our compiled reference too."""
        return fastest(row for row in self.rows if not row.ours)

    @property
    def fastest_eager_peer(self) -> Row | None:
        """The fastest peer without torch.compile."""
        return fastest(row for row in self.rows if not row.ours and not row.compiled)

    @property
    def bound_seconds(self) -> float:
        """Seconds that the bound's bytes take at copy bandwidth."""
        return (self.forward_bytes + self.backward_bytes) / self.copy_bandwidth

    def add_ratios(self, content: dict[str, Any]) -> None:
        """Add medians and ratios to the JSON content of this result."""
        for row, entry in zip(self.rows, content["rows"], strict=True):
            if row.state == "timed":
                entry["median_seconds"] = row.total
                entry["times_ours"] = row.total / self.ours.total if self.ours else None
        for key in ("fastest_peer", "fastest_eager_peer"):
            row = getattr(self, key)
            content[key] = row.implementation if row else None

    def sheets(self) -> list[Sheet]:
        """Return the sheets of implementations, operators and boundaries."""
        p, peer = self.problem, None if self.eager_only else self.fastest_peer
        launches = LAUNCHES[p.device.partition(":")[0]]
        implementations = Sheet(
            f"{p.dtype}, {p.size}, {p.numerics} numerics, {samples(self.rows)}",
            list(COLUMNS),
            [
                [cell(self, row) for cell in COLUMNS.values()]
                for row in self.rows
                if row.state == "timed"
            ],
            self._notes(),
            LEGEND.format(launches=launches),
            [
                f"{row.state}: {row.implementation}: {row.reason}"
                for row in self.rows
                if row.state != "timed"
            ],
        )
        sheets = [implementations, operators_sheet(self.operators)]
        if self.boundaries:
            name = peer.implementation if peer else ""
            sheets.append(boundaries_sheet(self.boundaries, name, peer))
        return sheets

    def speeds(self, row: Row, unit: float) -> tuple[float, float]:
        """Bytes of the bound over the seconds of forward, and of backward, in `unit`s."""
        forward, backward = row.halves
        return self.forward_bytes / forward / unit, self.backward_bytes / backward / unit

    def _notes(self) -> list[str]:
        """The bound, the fastest peers, differences of the equations, refusing backends."""
        n = self.problem.streams
        notes = [
            f"bound: {self.forward_bytes / 1e6:.1f} MB forward, {4 * n + 2}C a token, "
            f"{self.backward_bytes / 1e6:.1f} MB backward, {5 * n + 3}C; a large copy moves "
            f"{self.copy_bandwidth / 1e9:.1f} GB/s: {milliseconds(self.bound_seconds)} ms in all"
        ]
        fastest_peers = [("fastest eager peer", self.fastest_eager_peer)]
        if not self.eager_only:
            fastest_peers.insert(0, ("fastest peer, compiled ones included", self.fastest_peer))
        for title, row in fastest_peers:
            if row and (ours := self.ours):
                times = f"{row.total / ours.total:.2f} times {ours.implementation}"
                notes.append(f"{title}: {row.implementation}, {times}")
        notes += [
            f"{row.implementation}: {row.note}"
            for row in self.rows
            if row.note and not row.compiled and row.state != "missing"
        ]
        return [*notes, *(f"backend {name}: {reason}" for name, reason in self.refused.items())]


def _ratio(value: int | float | None, unit: int | float | None = 1) -> str:
    return NONE if value is None or unit is None else f"{value / unit:.2f}"


def _pair(values: Sequence[int | float | None], digits: int = 0) -> str:
    """Figures of forward and of backward as one cell."""
    return " / ".join(NONE if value is None else f"{value:.{digits}f}" for value in values)


COLUMNS: dict[str, Callable[[OpsResult, Row], str]] = {
    "implementation": lambda result, row: row.implementation,
    "forward ms": lambda result, row: milliseconds(row.halves[0]),
    "backward ms": lambda result, row: milliseconds(row.halves[1]),
    "total ms": lambda result, row: milliseconds(row.total),
    "quartiles": lambda result, row: quartiles(row),
    "threads": lambda result, row: "graph" if row.graphed else str(row.threads),
    "GB/s": lambda result, row: _pair(result.speeds(row, 1e9), digits=1),
    "% of copy": lambda result, row: _pair(result.speeds(row, result.copy_bandwidth / 100)),
    "x bound": lambda result, row: f"{row.total / result.bound_seconds:.1f}",
    "memory": lambda result, row: _ratio(row.extra_bytes, result.problem.stream_bytes),
    "launches": lambda result, row: _pair((row.forward_launches, row.backward_launches)),
    "first s": lambda result, row: _ratio(row.first_call),
    "x ours": lambda result, row: _ratio(row.total, result.ours.total if result.ours else None),
}


def fastest(rows: Iterable[Row]) -> Row | None:
    """Return the timed row with the smallest median; None without one."""
    return min((row for row in rows if row.state == "timed"), key=lambda r: r.total, default=None)


def bench_ops(
    problem: Problem, rounds: int, eager_only: bool, progress: Callable[[str], None]
) -> OpsResult:
    """Check, count and time every implementation; `progress` gets the name of each step.

    Peers that are missing or wrong keep their row, without figures.
    """
    bandwidth = copy_bandwidth(problem.device)
    inputs = problem.inputs()
    backends, refused = supported_backends(problem)
    rows: list[Row] = []
    runs: list[tuple[Row, Run]] = []
    for row, build in _contenders(problem, inputs, backends, eager_only):
        progress(f"{problem.dtype}: {row.implementation}")
        if (run := _prepare(row, build, inputs)) is not None:
            runs.append((row, run))
        rows.append(row)
    progress(f"{problem.dtype}: {rounds} rounds of all")
    threads = [thread_counts(problem.device, row.compiled) for row, _ in runs]
    measure([row for row, _ in runs], [run for _, run in runs], rounds, threads)
    progress(f"{problem.dtype}: operators")
    operators = bench_operators(problem, backends, rounds)
    progress(f"{problem.dtype}: boundaries")
    boundaries = bench_boundaries(problem, backends[0], rounds)
    bound = bound_bytes(problem)
    return OpsResult(problem, bandwidth, *bound, rows, operators, eager_only, refused, boundaries)


Build = Callable[[], Implementation]


def _contenders(
    problem: Problem, inputs: Inputs, backends: Sequence[str], eager_only: bool
) -> Iterator[tuple[Row, Build]]:
    """Rows without figures, each with the function that builds its implementation."""
    for backend in backends:
        yield Row(f"manifold-hc, {backend}", True, False), partial(ours, problem, inputs, backend)
    if not eager_only:
        build: Build = partial(ours, problem, inputs, "reference")
        yield Row("manifold-hc, reference, compiled", False, True), partial(_compiled, build)
    for peer in peers.for_problem(problem):
        build = partial(peer.build, problem, inputs)
        yield Row(peer.package, False, False, peer.version, peer.note), build
        if peer.compiles and not eager_only:
            name = f"{peer.package}, compiled"
            yield Row(name, False, True, peer.version, peer.note), partial(_compiled, build)


def _compiled(build: Build) -> Implementation:
    return compiled(build())


def _prepare(row: Row, build: Build, inputs: Inputs) -> Run | None:
    """Fill in all figures but the times; return the run, or None if it is missing or wrong."""
    try:
        with quiet():
            implementation = build()
            task = implementation.task(inputs)
            row.first_call = first_call(task.both)
            comparison = check(implementation, inputs)
    except Exception as error:  # a peer may fail in any way: it gets a row, and the bench goes on
        if row.ours:
            raise
        row.reason = _reason(error, inputs.x.device.type)
        return None
    row.error, row.tolerance = comparison.error, comparison.tolerance
    if not comparison.ok:
        row.state = "wrong"
        row.reason = f"{comparison.worst} is off by {comparison.error:.1e}"
        return None
    with quiet():
        counts = cost(implementation, inputs)
        replay = None if task.device.type == "cpu" else graphed(task)
    row.extra_bytes, row.forward_launches, row.backward_launches = counts
    row.state, row.graphed = "timed", replay is not None
    return replay or timed(task)


def _reason(error: Exception, device: str) -> str:
    if isinstance(error, ImportError):
        return peers.install_hint(error, device)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
