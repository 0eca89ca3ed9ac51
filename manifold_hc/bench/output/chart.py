"""The bar chart of the README, made from the result files and from nothing else."""

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from manifold_hc.bench.ops import OpsTable
from manifold_hc.bench.output.results import Record, load

OURS, PEER = "#00798c", "#b8bec6"


def chart(folder: Path) -> bytes | None:
    """The newest `ops` result as an SVG: one connection, forward and backward, by implementation.

    The same files give the same bytes. None for a folder without such a result. Raises DataError
    for a file that is no result.
    """
    records = [load(file) for file in sorted(folder.glob("*.json"))]
    timed = [record for record in records if record.ops]
    if not timed:
        return None
    record = max(timed, key=lambda record: record.date)
    # Texts as texts, and names of parts that do not change from run to run.
    as_text = mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "manifold-hc"})
    with as_text, io.BytesIO() as file:
        figure = _figure(record, record.ops or [])
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
        lines = file.getvalue().decode().splitlines()
    return "".join(f"{line.rstrip()}\n" for line in lines).encode()


def _figure(record: Record, tables: Sequence[OpsTable]) -> Figure:
    machine, problem = record.machine, tables[0].problem
    figure = Figure(figsize=(10, 1.2 + 0.3 * len(tables[0].rows)), layout="constrained")
    axes = figure.subplots(1, len(tables), squeeze=False)[0]
    for axis, table in zip(axes, tables, strict=True):
        _bars(axis, table)
    figure.suptitle(
        f"One mHC connection, forward and backward, without its branch: milliseconds\n"
        f"{problem.tokens} tokens, n = {problem.streams}, C = {problem.channels}; "
        f"{machine.device}, {machine.threads} threads, torch {machine.versions['torch']}, "
        f"{record.date}",
        fontsize=10,
    )
    return figure


def _bars(axis: Axes, table: OpsTable) -> None:
    rows = sorted((row for row in table.rows if row.state == "timed"), key=lambda row: -row.total)
    values = [1e3 * row.total for row in rows]
    colours = [OURS if row is table.ours else PEER for row in rows]
    bars = axis.barh([row.implementation for row in rows], values, color=colours)
    axis.bar_label(bars, labels=[f"{value:.3g}" for value in values], padding=3, fontsize=9)
    axis.set_title(table.problem.dtype, fontsize=10)
    axis.set_xlim(0, 1.15 * max(values))
    axis.set_xticks([])
    axis.tick_params(length=0, labelsize=9)
    axis.spines[:].set_visible(False)
