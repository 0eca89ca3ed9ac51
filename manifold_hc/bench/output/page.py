"""The page of all benchmarks, made from the result files and from nothing else."""

from collections.abc import Sequence
from pathlib import Path

from manifold_hc.bench.operators import OperatorRow
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
from manifold_hc.bench.output.results import Record, load
from manifold_hc.bench.stacks import StackTable
from manifold_hc.bench.step import StepTable

CHART = "![One connection, forward and backward, by implementation](images/benchmarks.svg)"

PAGE = Path("docs/benchmarks.md")

TITLES = {"cpu": "CPU", "cuda": "GPU"}

INTRODUCTION = """# Benchmarks

Made by `mhc bench page` from the files in `benchmarks/results/`; do not edit.

`mhc bench ops` times one connection, forward and backward, its branch left out. Every
implementation first passes a gate, outputs and all gradients against float64. Then all take turns,
call by call in one process, each at the better of one and all threads; compiled code is made for
all of them. `mhc bench step` times the parts of a training step at the shapes of one of the
paper's models and adds them up to its full depth; the overhead is what mHC adds to the layers, as a
share of the whole step with residual connections. `mhc bench memory` counts what a stack of
connections holds for its backward pass, by the length of the blocks that recompute rebuilds.

To measure on your machine, and make this page and the chart again:

```bash dry
pip install 'manifold-hc[bench]'
mhc bench ops --save
mhc bench step --preset 3b --save
mhc bench memory --save
mhc bench page
```
"""


def page(folder: Path) -> str:
    """The page in Markdown. Raises DataError for a file that is no result."""
    records = [load(file) for file in sorted(folder.glob("*.json"))]
    lines = [INTRODUCTION]
    if any(record.ops for record in records):
        lines += [CHART, ""]
    for kind, title in TITLES.items():
        lines += [f"## {title}", ""]
        mine = _newest([record for record in records if record.machine.kind == kind])
        for record in mine:
            lines += _section(record)
        if not mine:
            lines += ["Not measured.", ""]
    return "\n".join(lines).rstrip() + "\n"


def _newest(records: Sequence[Record]) -> list[Record]:
    """The last measurement of every bench on every device."""
    found = {
        (record.machine.device, record.bench): record
        for record in sorted(records, key=lambda record: record.date)
    }
    return [found[key] for key in sorted(found)]


def _section(record: Record) -> list[str]:
    machine = record.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    lines = [
        f"### {machine.device}: {record.bench}",
        "",
        f"`{record.command}`, {record.date}, {machine.threads} threads, {versions}, "
        f"commit {record.commit or 'unknown'}.",
        "",
    ]
    for ops in record.ops or []:
        lines += _ops(ops)
    for step in record.step or []:
        lines += _step(step)
    for stack in record.memory or []:
        lines += _stack(stack)
    if record.memory:
        lines += [STACK_LEGEND, ""]
    if record.ops:
        lines += [OPS_LEGEND.format(launches=LAUNCHES[machine.kind]), ""]
    return lines


def _ops(table: OpsTable) -> list[str]:
    cells = [
        ops_cells(table, row)
        if row.state == "timed"
        else [row.implementation, f"{row.state}: {row.reason}", *[""] * (len(OPS_COLUMNS) - 2)]
        for row in table.rows
    ]
    lines = [f"**{ops_title(table)}**", "", *_markdown(OPS_COLUMNS, cells), ""]
    lines += [*(f"- {note}" for note in ops_notes(table)), ""]
    lines += [*_markdown(*operator_cells(table.operators)), ""]
    if table.boundaries:
        lines += [*_markdown(BOUNDARY_COLUMNS, boundary_cells(table)), ""]
        lines += [f"- {note}" for note in (*boundary_notes(table), BOUNDARY_LEGEND)] + [""]
    return lines


def operator_cells(rows: Sequence[OperatorRow]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: milliseconds of forward and backward, an operator a row."""
    backends = list(dict.fromkeys(row.backend for row in rows))
    seconds = {(row.operator, row.backend): row.total for row in rows}
    operators = dict.fromkeys(row.operator for row in rows)
    columns = ["operator", *(f"{backend} ms" for backend in backends)]
    return columns, [
        [operator, *(f"{1e3 * seconds[operator, backend]:.3g}" for backend in backends)]
        for operator in operators
    ]


def _step(table: StepTable) -> list[str]:
    cells = [step_cells(table, part) for part in table.parts]
    lines = [f"**{step_title(table)}**", "", *_markdown(STEP_COLUMNS, cells), ""]
    return [*lines, *(f"- {note}" for note in step_notes(table)), ""]


def _stack(table: StackTable) -> list[str]:
    cells = [stack_cells(table, row) for row in table.rows]
    lines = [f"**{stack_title(table)}**", "", *_markdown(STACK_COLUMNS, cells), ""]
    return [*lines, *(f"- {note}" for note in stack_notes(table)), ""]


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
