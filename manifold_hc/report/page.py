"""The page of a run folder: one self-contained HTML file."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import msgspec
import numpy as np

from manifold_hc.files import write_atomically
from manifold_hc.report import figures
from manifold_hc.report.runs import Run
from manifold_hc.report.table import BASELINE, as_table, summarise

ORIGIN = ("folder", "date", "machine")
"""Members of the record that are shown below the title, if known."""


@dataclass(frozen=True)
class _Section:
    title: str
    text: str
    svg: str


def write_page(runs: Sequence[Run], record: dict[str, Any], page: Path) -> None:
    """Write the self-contained HTML file `page`, and a PNG of its main plots with the same name.

    record: folder, date, commands, machine and versions, shown unchanged.
    """
    write_atomically(page, render(runs, record))
    write_atomically(page.with_suffix(".png"), figures.to_png(figures.overview(runs)))


def render(runs: Sequence[Run], record: dict[str, Any]) -> str:
    """Return the page as HTML text."""
    variants = list(dict.fromkeys(run.variant for run in runs))
    table = as_table(summarise(runs))
    columns = [list(column.cells) for column in table.columns]
    steps = runs[0].config.training.steps
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("manifold_hc.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("page.html.jinja").render(
        title=" · ".join(variants),
        subtitle=f"{steps} steps, {len({run.seed for run in runs})} seed(s)",
        origin=" · ".join(str(record[key]) for key in ORIGIN if key in record),
        command="\n".join(record.get("commands", [])),
        several=len(runs) > len(variants),
        headings=[column.header for column in table.columns],
        rows=list(zip(*columns, strict=True)),
        sections=_sections(runs, BASELINE if BASELINE in variants else None),
        probes=[_probe_row(run) for run in runs if run.gains],
        configurations=[
            {"name": f"{run.variant} seed {run.seed}", "json": _pretty(run.config)} for run in runs
        ],
        record=json.dumps({k: v for k, v in record.items() if k != "commands"}, indent=2)
        if record
        else None,
    )


def _sections(runs: Sequence[Run], baseline: str | None) -> list[_Section]:
    """Plot the sections; those of stability figures only if a run was probed."""
    plots = [
        ("Loss", "Running mean over 3 % of the run.", figures.loss(runs, baseline)),
        (
            "Validation loss",
            "On the part of the text that is held out, the same batches every time.",
            figures.validation(runs, baseline),
        ),
        (
            "Gradient norm",
            "Of all parameters, before clipping; running mean over 3 % of the run.",
            figures.gradient_norm(runs, baseline),
        ),
    ]
    if any(run.gains for run in runs):
        plots += [
            (
                "Gain over training",
                "The largest composite gain over depth. Unconstrained matrices multiply up; "
                "doubly stochastic ones cannot.",
                figures.gain_over_training(runs),
            ),
            (
                "Gain over depth",
                "At the last step: each sublayer's own matrix, and the product from it to the "
                "exit.",
                figures.gain_over_depth(runs),
            ),
            (
                "Composite matrices",
                "The product over the whole network at the last step, mean over tokens: how much "
                "of each input stream arrives in each output stream.",
                figures.composite_matrices(runs),
            ),
            (
                "Streams",
                "Before each sublayer at the last step. Equal streams have cosine 1 and rank 1.",
                figures.streams_over_depth(runs),
            ),
        ]
    return [_Section(title, text, figures.to_svg(figure)) for title, text, figure in plots]


def _probe_row(run: Run) -> list[str]:
    """Format the figures of the last probe as a row of cells."""
    last = run.gains[-1]
    cells = [
        np.max(last[average][f"composite_{direction}"])
        for direction in ("forward", "backward")
        for average in ("gains", "matrices")
    ]
    cells += [np.max(last[key]) for key in ("log_column_sum", "composite_log_column_sum")]
    cells.append(np.max(last["stochastic_distance"]))
    return [f"{run.variant} seed {run.seed}", *(f"{cell:.4g}" for cell in cells)]


def _pretty(config: object) -> str:
    return msgspec.json.format(msgspec.json.encode(config)).decode()
