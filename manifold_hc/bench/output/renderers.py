"""A sheet on a terminal, and as Markdown."""

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from manifold_hc.bench.output.sheet import Sheet

GAP = 2
"""Spaces between two columns of a terminal."""


def terminal(sheet: Sheet, width: int) -> RenderableType:
    """Render for a terminal of `width` columns; a table that is wider is turned on its side."""
    lines = [sheet.columns, *sheet.rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    turned = sum(widths) + GAP * (len(widths) - 1) > width
    columns, *rows = list(zip(*lines, strict=True)) if turned else lines
    table = Table(box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(escape(column), justify="right" if index else "left", no_wrap=not turned)
    for row in rows:
        table.add_row(*map(escape, row))
    return Group(
        f"[bold]{escape(sheet.title)}[/]",
        table,
        *(f"[red]{escape(failure)}[/]" for failure in sheet.failures),
        *map(escape, sheet.notes),
        *([f"[dim]{escape(sheet.legend)}[/]"] if sheet.legend else []),
        "",
    )


def markdown(sheet: Sheet) -> Iterator[str]:
    """Yield the lines of title, table and notes; a page prints each legend once, at its end."""
    yield from (f"**{sheet.title}**", "")
    yield from map(_row, [sheet.columns, ["---", *["---:"] * (len(sheet.columns) - 1)]])
    yield from map(_row, sheet.rows)
    yield ""
    if remarks := [*sheet.failures, *sheet.notes]:
        yield from (f"- {remark}" for remark in remarks)
        yield ""


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
