"""The same figures on a terminal."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from manifold_hc.bench.ops import OpsTable
from manifold_hc.bench.output.figures import (
    BOUNDARY_COLUMNS,
    BOUNDARY_LEGEND,
    LAUNCHES,
    OPS_COLUMNS,
    OPS_LEGEND,
    STACK_COLUMNS,
    STACK_LEGEND,
    STEP_COLUMNS,
    boundary_cells,
    boundary_notes,
    ops_cells,
    ops_notes,
    ops_title,
    stack_cells,
    stack_notes,
    stack_title,
    step_cells,
    step_notes,
    step_title,
)
from manifold_hc.bench.output.page import operator_cells
from manifold_hc.bench.stacks import StackTable
from manifold_hc.bench.step import StepTable


def ops_table(table: OpsTable, *, upright: bool = False) -> RenderableType:
    """Every implementation, the ratios, the operators; `upright` for a narrow terminal."""
    timed = [row for row in table.rows if row.state == "timed"]
    figures = _table(OPS_COLUMNS, [ops_cells(table, row) for row in timed], upright)
    failures = [
        f"[red]{row.state}: {escape(row.implementation)}: {escape(row.reason)}[/]"
        for row in table.rows
        if row.state != "timed"
    ]
    device = table.problem.device.partition(":")[0]
    legend = OPS_LEGEND.format(launches=LAUNCHES.get(device, "kernels"))
    operators = _table(*operator_cells(table.operators))
    return Group(
        f"[bold]{ops_title(table)}[/]", figures, *failures, *_lines(ops_notes(table)), "",
        operators, "", f"[dim]{escape(legend)}[/]", "",
        _table(BOUNDARY_COLUMNS, boundary_cells(table)), *_lines(boundary_notes(table)), "",
        f"[dim]{escape(BOUNDARY_LEGEND)}[/]", "",
    )  # fmt: skip


def step_table(table: StepTable) -> RenderableType:
    """Every part, and the overhead."""
    figures = _table(STEP_COLUMNS, [step_cells(table, part) for part in table.parts])
    failures = [
        f"[red]missing: {escape(kind)}: {escape(reason)}[/]"
        for kind, reason in table.missing.items()
    ]
    notes = _lines(step_notes(table))
    return Group(f"[bold]{step_title(table)}[/]", figures, *failures, *notes, "")


def stack_table(table: StackTable, *, upright: bool = False) -> RenderableType:
    """Every block length; `upright` for a narrow terminal."""
    figures = _table(STACK_COLUMNS, [stack_cells(table, row) for row in table.rows], upright)
    notes = _lines(stack_notes(table))
    legend = f"[dim]{escape(STACK_LEGEND)}[/]"
    return Group(f"[bold]{stack_title(table)}[/]", figures, *notes, "", legend, "")


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], upright: bool = False) -> Table:
    if upright:
        columns, *rows = [list(line) for line in zip(columns, *rows, strict=True)]
    table = Table(box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(escape(column), justify="right" if index else "left", no_wrap=not upright)
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _lines(texts: Sequence[str]) -> list[str]:
    return [escape(text) for text in texts]
