"""A table of figures as text, its renderers, and the formats of its cells."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import quantiles

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from manifold_hc.bench.measure.timing import Timing

GAP = 2
"""Spaces between two columns of a terminal."""

NONE = "-"
"""Cell without a figure."""


@dataclass(frozen=True)
class Sheet:
    """One table with its title and remarks."""

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

    def terminal(self, width: int) -> RenderableType:
        """Render for a terminal of `width` columns; a table that is wider is turned on its side."""
        lines = [self.columns, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        turned = sum(widths) + GAP * (len(widths) - 1) > width
        columns, *rows = list(zip(*lines, strict=True)) if turned else lines
        table = Table(box=None, pad_edge=False)
        for index, column in enumerate(columns):
            table.add_column(
                escape(column), justify="right" if index else "left", no_wrap=not turned
            )
        for row in rows:
            table.add_row(*map(escape, row))
        return Group(
            f"[bold]{escape(self.title)}[/]",
            table,
            *(f"[red]{escape(failure)}[/]" for failure in self.failures),
            *map(escape, self.notes),
            *([f"[dim]{escape(self.legend)}[/]"] if self.legend else []),
            "",
        )

    def markdown(self) -> Iterator[str]:
        """Yield the lines of title, table and notes; a page prints each legend once, at its end."""
        yield from (f"**{self.title}**", "")
        yield from map(_row, [self.columns, ["---", *["---:"] * (len(self.columns) - 1)]])
        yield from map(_row, self.rows)
        yield ""
        if remarks := [*self.failures, *self.notes]:
            yield from (f"- {remark}" for remark in remarks)
            yield ""


def milliseconds(seconds: float) -> str:
    """Three significant digits, or all digits of the whole number."""
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds, or milliseconds below one second."""
    return f"{seconds:.2f} s" if abs(seconds) >= 1 else f"{milliseconds(seconds)} ms"


TIMES: dict[str, Callable[[Timing], str]] = {
    "forward ms": lambda timing: milliseconds(timing.halves[0]),
    "backward ms": lambda timing: milliseconds(timing.halves[1]),
    "total ms": lambda timing: milliseconds(timing.total),
}
"""Columns of the medians, each with its cell."""


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


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
