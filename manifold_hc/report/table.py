"""The figures of a comparison, a row a variant."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from statistics import mean, stdev
from typing import Any

from rich.table import Table

from manifold_hc.report.runs import Run

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % quantiles of Student's t for 1 to 9 degrees of freedom."""


@dataclass(frozen=True)
class VariantRow:
    """One variant over its seeds; NaN where every seed diverged or nothing was probed."""

    variant: str
    seeds: int
    diverged: int
    """Seeds whose loss or gradient norm stopped being finite; left out of the means."""
    validation_loss: float
    """Mean over seeds, nats a token."""
    interval: float
    """Half the 95 % interval of that mean; NaN for a single seed."""
    seconds_per_step: float
    """Median step of each run, mean over seeds."""
    largest_gradient_norm: float
    """Over all steps and seeds, before clipping."""
    largest_forward_gain: float
    """Composite, over depth, probed steps and seeds; mean over tokens."""
    largest_backward_gain: float
    parameters: int


def summarise(runs: Sequence[Run]) -> list[VariantRow]:
    """One row a variant, in the order of the runs."""
    variants = dict.fromkeys(run.variant for run in runs)
    return [_row(name, [run for run in runs if run.variant == name]) for name in variants]


def _row(name: str, runs: list[Run]) -> VariantRow:
    whole = [run.summary for run in runs if run.diverged_at is None]
    losses = [summary["validation_loss"] for summary in whole]
    return VariantRow(
        variant=name,
        seeds=len(runs),
        diverged=len(runs) - len(whole),
        validation_loss=mean(losses) if losses else math.nan,
        interval=_interval(losses),
        seconds_per_step=mean(s["seconds_per_step"] for s in whole) if whole else math.nan,
        largest_gradient_norm=max((s["largest_gradient_norm"] for s in whole), default=math.nan),
        largest_forward_gain=max(run.largest("gain_forward") for run in runs),
        largest_backward_gain=max(run.largest("gain_backward") for run in runs),
        parameters=whole[0]["parameters"] if whole else 0,
    )


def _interval(values: list[float]) -> float:
    if len(values) < 2:
        return math.nan
    freedom = len(values) - 1
    quantile = STUDENT[freedom - 1] if freedom <= len(STUDENT) else 1.96
    return quantile * stdev(values) / math.sqrt(len(values))


def as_table(rows: Sequence[VariantRow]) -> Table:
    """For people."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("variant")
    for heading in (
        "validation loss",
        "s/step",
        "largest gradient norm",
        "largest composite gain forward",
        "backward",
        "parameters",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        loss = f"{row.validation_loss:.4f}"
        if not math.isnan(row.interval):
            loss += f" ± {row.interval:.4f}"
        if row.diverged:
            loss += f" ({row.diverged} of {row.seeds} diverged)"
        table.add_row(
            row.variant,
            loss,
            f"{row.seconds_per_step:.3f}",
            f"{row.largest_gradient_norm:.2f}",
            f"{row.largest_forward_gain:.4g}",
            f"{row.largest_backward_gain:.4g}",
            f"{row.parameters:,}",
        )
    return table


def as_csv(rows: Sequence[VariantRow]) -> str:
    """For spreadsheets."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(VariantRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def as_json(rows: Sequence[VariantRow], runs: Sequence[Run]) -> dict[str, Any]:
    """For programs: the rows, and the figures of every run; null where a figure is NaN."""
    return {
        "variants": [_without_nan(asdict(row)) for row in rows],
        "runs": [
            _without_nan(
                {
                    "variant": run.variant,
                    "seed": run.seed,
                    **run.summary,
                    "largest_forward_gain": run.largest("gain_forward"),
                    "largest_backward_gain": run.largest("gain_backward"),
                }
            )
            for run in runs
        ],
    }


def _without_nan(row: dict[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and math.isnan(value) else value
        for key, value in row.items()
    }
