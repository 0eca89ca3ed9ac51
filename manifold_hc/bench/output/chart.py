"""The bar chart of the README, made from the result files alone."""

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from manifold_hc.bench.ops import OpsResult
from manifold_hc.bench.output.results import Record, load_all

OURS, PEER = "#00798c", "#b8bec6"


def chart(folder: Path) -> bytes | None:
    """Draw the newest `ops` result as an SVG: one connection, by implementation.

    The same files give the same bytes. Returns None for a folder without such a result. Raises
    DataError for a file that is no result file.
    """
    records = [record for record in load_all(folder) if record.ops]
    if not records:
        return None
    record = max(records, key=lambda record: record.date)
    # Labels stay text, and the ids of elements are the same in every run.
    reproducible = mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "manifold-hc"})
    with reproducible, io.BytesIO() as file:
        figure = _figure(record, record.ops or [])
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
        lines = file.getvalue().decode().splitlines()
    return "".join(f"{line.rstrip()}\n" for line in lines).encode()


def _figure(record: Record, results: Sequence[OpsResult]) -> Figure:
    machine, problem = record.machine, results[0].problem
    figure = Figure(figsize=(10, 1.2 + 0.3 * len(results[0].rows)), layout="constrained")
    axes = figure.subplots(1, len(results), squeeze=False)[0]
    for axis, result in zip(axes, results, strict=True):
        timed = (row for row in result.rows if row.state == "timed")
        rows = sorted(timed, key=lambda row: -row.total)
        values = [1e3 * row.total for row in rows]
        colours = [OURS if row is result.ours else PEER for row in rows]
        bars = axis.barh([row.implementation for row in rows], values, color=colours)
        axis.bar_label(bars, labels=[f"{value:.3g}" for value in values], padding=3, fontsize=9)
        axis.set_title(result.problem.dtype, fontsize=10)
        axis.set_xlim(0, 1.15 * max(values))
        axis.set_xticks([])
        axis.tick_params(length=0, labelsize=9)
        axis.spines[:].set_visible(False)
    figure.suptitle(
        f"One mHC connection, forward and backward, without its branch: milliseconds\n"
        f"{problem.size}; {machine.device}, {machine.threads} threads, "
        f"torch {machine.versions['torch']}, {record.date}",
        fontsize=10,
    )
    return figure
