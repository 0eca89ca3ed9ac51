"""`mhc bench ops`: one connection by every implementation that runs on the device."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from manifold_hc.bench import peers
from manifold_hc.bench.boundaries import BoundaryRow, bench_boundaries, boundaries_sheet
from manifold_hc.bench.correctness import check
from manifold_hc.bench.measure.memory import cost
from manifold_hc.bench.measure.timing import (
    Run,
    Timing,
    copy_bandwidth,
    first_call,
    graphed,
    measure,
    thread_counts,
    timed,
)
from manifold_hc.bench.operators import OperatorRow, bench_operators, operators_sheet
from manifold_hc.bench.output.sheet import NONE, TIMES, Sheet, milliseconds, quartiles, samples
from manifold_hc.bench.peers.implementations import Implementation, ours, supported_backends
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
        columns: dict[str, Callable[[Row], str]] = {
            "implementation": lambda row: row.implementation,
            **TIMES,
            "quartiles": quartiles,
            "threads": lambda row: "graph" if row.graphed else str(row.threads),
            "GB/s": lambda row: _pair(self.speeds(row, 1e9), digits=1),
            "% of copy": lambda row: _pair(self.speeds(row, self.copy_bandwidth / 100)),
            "x bound": lambda row: f"{row.total / self.bound_seconds:.1f}",
            "memory": lambda row: _ratio(row.extra_bytes, p.stream_bytes),
            "launches": lambda row: _pair((row.forward_launches, row.backward_launches)),
            "first s": lambda row: _ratio(row.first_call),
            "x ours": lambda row: _ratio(row.total, self.ours.total if self.ours else None),
        }
        shown = [row for row in self.rows if row.state == "timed"]
        failed = [row for row in self.rows if row.state != "timed"]
        implementations = Sheet(
            f"{p.dtype}, {p.size}, {p.numerics} numerics, {samples(self.rows)}",
            list(columns),
            [[cell(row) for cell in columns.values()] for row in shown],
            self._notes(),
            LEGEND.format(launches=LAUNCHES[p.device.partition(":")[0]]),
            [f"{row.state}: {row.implementation}: {row.reason}" for row in failed],
        )
        sheets = [implementations, operators_sheet(self.operators)]
        if self.boundaries:
            sheets.append(
                boundaries_sheet(self.boundaries, peer.implementation if peer else "", peer)
            )
        return sheets

    def speeds(self, row: Row, unit: float) -> tuple[float, float]:
        """Bytes of the bound over the seconds of forward, and of backward, in `unit`s."""
        forward, backward = row.halves
        return self.forward_bytes / forward / unit, self.backward_bytes / backward / unit

    def _notes(self) -> list[str]:
        """The bound, the fastest peers, differences of the equations, refusing backends."""
        forward, backward = self.problem.bound_elements
        notes = [
            f"bound: {self.forward_bytes / 1e6:.1f} MB forward, {forward}C a token, "
            f"{self.backward_bytes / 1e6:.1f} MB backward, {backward}C; a large copy moves "
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
    measure(runs, rounds, threads)
    progress(f"{problem.dtype}: operators")
    operators = bench_operators(problem, backends, rounds)
    progress(f"{problem.dtype}: boundaries")
    boundaries = bench_boundaries(problem, backends[0], rounds)
    bound = problem.bound_bytes
    return OpsResult(problem, bandwidth, *bound, rows, operators, eager_only, refused, boundaries)


Build = Callable[[], Implementation]


def _contenders(
    problem: Problem, inputs: Inputs, backends: Sequence[str], eager_only: bool
) -> Iterator[tuple[Row, Build]]:
    """Rows without figures, each with the function that builds its implementation, uncompiled."""
    for backend in backends:
        yield Row(f"manifold-hc, {backend}", True, False), partial(ours, problem, inputs, backend)
    if not eager_only:
        name = "manifold-hc, reference, compiled"
        yield Row(name, False, True), partial(ours, problem, inputs, "reference")
    for peer in peers.for_problem(problem):
        for compiled in (False, True) if peer.compiles and not eager_only else (False,):
            name = f"{peer.package}{', compiled' * compiled}"
            row = Row(name, False, compiled, peer.version, peer.note)
            yield row, partial(peer.build, problem, inputs)


def _prepare(row: Row, build: Build, inputs: Inputs) -> Run | None:
    """Fill in all figures but the times; return the run, or None if it is missing or wrong."""
    try:
        with quiet():
            implementation = build().compile() if row.compiled else build()
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
