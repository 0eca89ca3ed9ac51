"""The cells of both tables, on a terminal and on the page."""

from collections.abc import Sequence
from statistics import median, quantiles

from manifold_hc.bench.boundaries import BASELINES, FUSED, SEPARATE, SINGLE_FUSED
from manifold_hc.bench.measure.memory_ledger import KINDS
from manifold_hc.bench.ops import OpsTable, Row
from manifold_hc.bench.stacks import StackRow, StackTable
from manifold_hc.bench.step import ANY, RESIDUAL, STREAMS, Part, StepTable

NONE = "-"

OPS_COLUMNS = (
    "implementation",
    "forward ms",
    "backward ms",
    "total ms",
    "middle half",
    "threads",
    "GB/s",
    "of copy %",
    "x bound",
    "memory",
    "launches",
    "first s",
    "x ours",
)

OPS_LEGEND = (
    "middle half: quartiles of total; GB/s, share of the copy bandwidth and launches: forward / "
    "backward; x bound: total over the time that the bound's bytes take at copy bandwidth; "
    "memory: peak of allocations beyond x, y, u, x' and their gradients, in sizes of the streams; "
    "first: first forward and backward pass; launches: {launches}."
)

LAUNCHES = {"cpu": "operators run, views left out, unknown inside compiled code", "cuda": "kernels"}


def ops_cells(table: OpsTable, row: Row) -> list[str]:
    """One row of a timed implementation, as `OPS_COLUMNS`."""
    forward, backward = median(row.forward), median(row.backward)
    speeds = table.forward_bytes / forward, table.backward_bytes / backward
    ours = table.ours
    return [
        row.implementation,
        milliseconds(forward),
        milliseconds(backward),
        milliseconds(row.total),
        middle_half(row.totals),
        "graph" if row.graphed else str(row.threads),
        " / ".join(f"{speed / 1e9:.1f}" for speed in speeds),
        " / ".join(f"{100 * speed / table.copy_bandwidth:.0f}" for speed in speeds),
        f"{row.total / bound_seconds(table):.1f}",
        NONE if row.extra_bytes is None else f"{row.extra_bytes / table.problem.stream_bytes:.2f}",
        f"{_count(row.forward_launches)} / {_count(row.backward_launches)}",
        NONE if row.first_call is None else f"{row.first_call:.2f}",
        f"{row.total / ours.total:.2f}" if ours else NONE,
    ]


def ops_title(table: OpsTable) -> str:
    """Size and dtype."""
    p = table.problem
    return (
        f"{p.dtype}, {p.tokens} tokens, n = {p.streams}, C = {p.channels}, {p.numerics} numerics, "
        f"median of {max((len(row.forward) for row in table.rows), default=0)}"
    )


def ops_notes(table: OpsTable) -> list[str]:
    """The bound, the ratios, and what differs in the rows."""
    n = table.problem.streams
    notes = [
        f"bound: {(table.forward_bytes) / 1e6:.1f} MB forward, {4 * n + 2}C a token, "
        f"{table.backward_bytes / 1e6:.1f} MB backward, {5 * n + 3}C; a large copy moves "
        f"{table.copy_bandwidth / 1e9:.1f} GB/s: {milliseconds(bound_seconds(table))} ms in all"
    ]
    pairs = [("fastest eager peer", table.fastest_eager_peer)]
    if not table.eager_only:
        pairs.insert(0, ("fastest peer, compiled ones included", table.fastest_peer))
    if (ours := table.ours) is not None:
        notes += [
            f"{what}: {row.implementation}, {row.total / ours.total:.2f} times "
            f"{ours.implementation}"
            for what, row in pairs
            if row is not None
        ]
    notes += [
        f"{row.implementation}: {row.note}" for row in table.rows if row.note and not row.compiled
    ]
    return [*notes, *(f"backend {name}: {why}" for name, why in table.refused.items())]


BOUNDARY_COLUMNS = ("a sublayer, in a run of them", "forward ms", "backward ms", "total ms", "x")

BOUNDARY_LEGEND = (
    "x: times as fast as separate operators. Elements a token and sublayer, forward, with the "
    "input norm: separate (4n + 4)C, fused (3n + 2)C, single pass (2n + 2)C; on a CPU a block of "
    "tokens stays in cache, and fused is (2n + 2)C too; on a GPU the norm is 2C more."
)


def boundary_cells(table: OpsTable) -> list[list[str]]:
    """Every form, as `BOUNDARY_COLUMNS`."""
    totals = {(row.form, row.norm): row.total for row in table.boundaries}
    return [
        [
            f"{row.form}{', with norms' if row.norm else ''}, {row.backend}",
            milliseconds(median(row.forward)),
            milliseconds(median(row.backward)),
            milliseconds(row.total),
            f"{totals[BASELINES.get(row.form, SEPARATE), row.norm] / row.total:.2f}",
        ]
        for row in table.boundaries
    ]


def boundary_notes(table: OpsTable) -> list[str]:
    """The fused forms against the fastest peer of the same run, whose norms nobody counts."""
    peer = table.fastest_peer
    if peer is None or table.eager_only:
        return []
    return [
        f"a sublayer, {row.form}: {peer.implementation} takes {peer.total / row.total:.2f} times "
        "as long"
        for row in table.boundaries
        if row.form in (FUSED, SINGLE_FUSED) and not row.norm
    ]


def bound_seconds(table: OpsTable) -> float:
    """What the bound's bytes take at the speed of a large copy."""
    return (table.forward_bytes + table.backward_bytes) / table.copy_bandwidth


STEP_COLUMNS = (
    "part",
    "connection",
    "in a step",
    "forward ms",
    "backward ms",
    "middle half",
    "more",
)


def step_cells(table: StepTable, part: Part) -> list[str]:
    """One part, as `STEP_COLUMNS`."""
    plain = {p.name: p for p in table.layers(RESIDUAL)}.get(part.name)
    compares = plain is not None and part.kind not in (RESIDUAL, ANY, STREAMS)
    return [
        part.name,
        {ANY: NONE, STREAMS: "several streams"}.get(part.kind, part.kind),
        f"{part.times:.3g}",
        milliseconds(median(part.forward)),
        milliseconds(median(part.backward)),
        middle_half(part.totals),
        f"{100 * (part.total / plain.total - 1):+.1f} %" if plain and compares else "",
    ]


def step_title(table: StepTable) -> str:
    """Preset, size and dtype."""
    p = table.problem
    return (
        f"{table.preset}, {p.dtype}, {p.tokens} tokens, n = {p.streams}, C = {p.channels}, "
        f"median of {max(len(part.forward) for part in table.parts)}"
    )


def step_notes(table: StepTable) -> list[str]:
    """The overhead of every kind, and what the step is made of."""
    notes = [f"a step at full depth with residual connections: {_duration(table.full_step())}"]
    notes += [
        f"overhead of {kind}: {100 * table.overhead(kind):.1f} % ({_range(table, kind)} by the "
        f"quartiles of the differences), {_duration(table.added(kind))}; "
        f"{100 * table.overhead_without_optimizer(kind):.1f} % of a step without its optimizer"
        for kind in table.kinds
        if kind != RESIDUAL
    ]
    return notes


STACK_COLUMNS = (
    "sublayers a block",
    *KINDS,
    "rest",
    "peak",
    "forward ms",
    "backward ms",
    "total ms",
    "more",
)

STACK_LEGEND = (
    "Memory in multiples of C a token: by kind when all kinds together were most; rest: what was "
    "allocated at the peak besides. Times of the connections alone; more: than without rebuilding."
)


def stack_cells(table: StackTable, row: StackRow) -> list[str]:
    """One block length, as `STACK_COLUMNS`."""
    plain = next(r for r in table.rows if r.recompute is None)
    sizes = [*(row.held[kind] for kind in KINDS), row.rest, row.peak]
    return [
        "all kept" if row.recompute is None else f"{row.recompute}{', auto' * row.chosen}",
        *(f"{table.share(size):.3g}" for size in sizes),
        milliseconds(median(row.forward)),
        milliseconds(median(row.backward)),
        milliseconds(row.total),
        "" if row is plain else f"{100 * (row.total / plain.total - 1):+.1f} %",
    ]


def stack_title(table: StackTable) -> str:
    """Size and dtype."""
    p = table.problem
    return (
        f"{p.dtype}, {table.sublayers} sublayers{' in single pass' * table.single_pass}, "
        f"{p.tokens} tokens, n = {p.streams}, C = {p.channels}, norms "
        f"{'inside the branches' if table.norms == 'inside' else 'given to the connections'}, "
        f"median of {max(len(row.forward) for row in table.rows)}"
    )


def stack_notes(table: StackTable) -> list[str]:
    """The streams, with and without."""
    plain = next(row for row in table.rows if row.recompute is None)
    return [
        f"streams held at most: {table.share(row.most_streams):.3g}C a token in blocks of "
        f"{row.recompute}, {table.share(plain.most_streams):.3g}C without"
        for row in table.rows
        if row.chosen
    ]


def _range(table: StepTable, kind: str) -> str:
    return " to ".join(f"{100 * share:.1f}" for share in table.overhead_range(kind))


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if abs(seconds) >= 1 else f"{milliseconds(seconds)} ms"


def milliseconds(seconds: float) -> str:
    """Three significant digits, more where the whole number has more."""
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def middle_half(seconds: Sequence[float]) -> str:
    """Lower and upper quartile in milliseconds."""
    if len(seconds) < 2:
        return NONE
    low, _, high = quantiles(seconds, n=4, method="inclusive")
    return f"{milliseconds(low)}..{milliseconds(high)}"


def _count(launches: int | None) -> str:
    return NONE if launches is None else str(launches)
