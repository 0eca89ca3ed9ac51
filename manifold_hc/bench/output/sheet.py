"""A table of figures as text, and the formats of its cells."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import quantiles

from manifold_hc.bench.measure.timing import Timing

NONE = "-"
"""Cell without a figure."""


@dataclass(frozen=True)
class Sheet:
    """One table with its title and remarks; the renderers print it on a terminal or a page."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    """Cells, as many in each row as there are columns."""
    notes: Sequence[str] = ()
    """Findings: one line each."""
    legend: str = ""
    """Meaning of the columns."""
    failures: Sequence[str] = ()
    """Rows without figures: state, name and reason, one line each."""


def milliseconds(seconds: float) -> str:
    """Three significant digits, or all digits of the whole number."""
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds, or milliseconds below one second."""
    return f"{seconds:.2f} s" if abs(seconds) >= 1 else f"{milliseconds(seconds)} ms"


TIMES = ("forward ms", "backward ms", "total ms")
"""Columns of `medians`."""


def medians(timing: Timing) -> list[str]:
    """Median milliseconds, in the columns `TIMES`."""
    return [milliseconds(seconds) for seconds in (*timing.halves, timing.total)]


def quartiles(timing: Timing) -> str:
    """Lower and upper quartile of the totals in milliseconds."""
    if len(timing.totals) < 2:
        return NONE
    low, _, high = quantiles(timing.totals, n=4, method="inclusive")
    return f"{milliseconds(low)}..{milliseconds(high)}"


def increase(timing: Timing, baseline: Timing) -> str:
    """Difference of the medians in percent of the baseline's."""
    return f"{100 * (timing.total / baseline.total - 1):+.1f} %"


def samples(timings: Sequence[Timing]) -> str:
    """Number of samples as titles show it."""
    return f"median of {max((len(timing.forward) for timing in timings), default=0)}"
