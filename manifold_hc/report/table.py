"""Table of a comparison: one row for each variant."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from statistics import mean, stdev
from typing import Any

from rich.table import Table

from manifold_hc.report.runs import Run, largest

BASELINE = "residual"
DIFFERENCE = f"difference to {BASELINE}"

CONFIDENCE = 0.95
"""Level of the confidence intervals."""


@dataclass(frozen=True)
class VariantRow:
    """Figures of one variant over its seeds; NaN if every seed diverged or none was probed."""

    variant: str
    seeds: int
    diverged: int
    """Seeds with a loss or gradient norm that is not finite; left out of the means."""
    validation_loss: float
    """Mean over seeds, nats a token."""
    interval: float
    """Half the 95 % confidence interval of `validation_loss`; NaN for a single seed."""
    difference: float
    """Mean difference of the loss to the residual run of the same seed; NaN without one."""
    difference_interval: float
    """Half the 95 % confidence interval of `difference`, paired by seed."""
    seconds_per_step: float
    """Median time of a step in a run, mean over seeds."""
    largest_gradient_norm: float
    """Largest gradient norm over all steps and seeds, before clipping."""
    largest_forward_gain: float
    """Largest composite gain over depth, probed steps and seeds; mean over tokens."""
    largest_backward_gain: float
    """Largest composite backward gain, as `largest_forward_gain`."""
    parameters: int


def summarise(runs: Sequence[Run]) -> list[VariantRow]:
    """Summarise every variant in one row, in the order of the runs."""
    variants = dict.fromkeys(run.variant for run in runs)
    baseline = _losses([run for run in runs if run.variant == BASELINE])
    return [_row(name, [run for run in runs if run.variant == name], baseline) for name in variants]


def _losses(runs: Sequence[Run]) -> dict[int, float]:
    """Return the validation loss by seed of the runs that did not diverge."""
    return {run.seed: run.summary["validation_loss"] for run in runs if run.diverged_at is None}


def _row(name: str, runs: list[Run], baseline: dict[int, float]) -> VariantRow:
    whole = [run.summary for run in runs if run.diverged_at is None]
    by_seed = _losses(runs)
    losses = list(by_seed.values())
    differences = [by_seed[seed] - baseline[seed] for seed in by_seed if seed in baseline]
    return VariantRow(
        variant=name,
        seeds=len(runs),
        diverged=len(runs) - len(whole),
        validation_loss=mean(losses) if losses else math.nan,
        interval=_interval(losses),
        difference=mean(differences) if differences else math.nan,
        difference_interval=_interval(differences),
        seconds_per_step=mean(s["seconds_per_step"] for s in whole) if whole else math.nan,
        largest_gradient_norm=largest(s["largest_gradient_norm"] for s in whole),
        largest_forward_gain=largest(run.largest("gain_forward") for run in runs),
        largest_backward_gain=largest(run.largest("gain_backward") for run in runs),
        parameters=whole[0]["parameters"] if whole else 0,
    )


def _interval(values: list[float]) -> float:
    """Compute half the confidence interval of the mean; NaN below two values."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return math.nan
    return student(len(values) - 1) * stdev(values) / math.sqrt(len(values))


@cache
def student(freedom: int) -> float:
    """Compute the two-sided 95 % quantile of Student's t, exact for any degrees of freedom.

    freedom: degrees of freedom, at least 1. Bisection of the distribution's finite series.

    >>> round(student(10), 3)
    2.228
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _probability(middle, freedom) < CONFIDENCE else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _probability(angle: float, freedom: int) -> float:
    """Compute P(|T| < sqrt(freedom) tan(angle)): Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    odd = freedom % 2
    term = math.sin(angle) * (math.cos(angle) if odd else 1.0)
    total = 0.0
    for step in range(freedom // 2):
        total += term
        term *= math.cos(angle) ** 2 * (2 * step + 1 + odd) / (2 * step + 2 + odd)
    return (angle + total) * 2 / math.pi if odd else total


def as_table(rows: Sequence[VariantRow], *, upright: bool = False) -> Table:
    """Format the rows as a table.

    upright: one column for each variant, for a narrow terminal. The differences are left out if
    there is no residual variant to compare with.
    """
    cells = [_cells(row) for row in rows]
    headings = [
        heading for heading in cells[0] if heading != DIFFERENCE or any(c[heading] for c in cells)
    ]
    lines = [headings, *([row[heading] for heading in headings] for row in cells)]
    if upright:
        lines = [list(line) for line in zip(*lines, strict=True)]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, heading in enumerate(lines[0]):
        table.add_column(heading, justify="right" if index else "left", overflow="fold")
    for line in lines[1:]:
        table.add_row(*line)
    return table


def _cells(row: VariantRow) -> dict[str, str]:
    """Format the cells of a row, by heading."""
    loss = _with_interval(f"{row.validation_loss:.4f}", row.interval)
    if row.diverged:
        loss += f" ({row.diverged} of {row.seeds} diverged)"
    comparable = row.variant != BASELINE and not math.isnan(row.difference)
    difference = _with_interval(f"{row.difference:+.4f}", row.difference_interval)
    return {
        "variant": row.variant,
        "validation loss": loss,
        DIFFERENCE: difference if comparable else "",
        "s/step": f"{row.seconds_per_step:.3f}",
        "largest gradient norm": f"{row.largest_gradient_norm:.2f}",
        "largest composite gain forward": f"{row.largest_forward_gain:.4g}",
        "backward": f"{row.largest_backward_gain:.4g}",
        "parameters": f"{row.parameters:,}",
    }


def _with_interval(figure: str, interval: float) -> str:
    return figure if math.isnan(interval) else f"{figure} ± {interval:.4f}"


def as_csv(rows: Sequence[VariantRow]) -> str:
    """Format the rows as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(VariantRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def as_json(rows: Sequence[VariantRow], runs: Sequence[Run]) -> dict[str, Any]:
    """Return the rows and the figures of every run as JSON values; NaN becomes null."""
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
