"""`mhc verify --checkpoint`: our forward pass against another implementation."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from rich.markup import escape
from rich.table import Table

from manifold_hc.cli.convert import Hyperparameters
from manifold_hc.cli.keys import override
from manifold_hc.cli.terminal import console
from manifold_hc.errors import ManifoldError
from manifold_hc.files import write_atomically

if TYPE_CHECKING:
    from manifold_hc.interop.layouts import Checkpoint
    from manifold_hc.verify import Compared, Report, Source
    from manifold_hc.verify.against import WeightDifference

SHOWN = 5
"""Largest number of differing parameters that are printed."""


def verify_checkpoint(
    path: Path,
    layout: str | None,
    overrides: tuple[str, ...],
    against: tuple[Path | None, str | None],
    recorded: Path | None,
    sizes: tuple[int, int],
    json_file: Path | None,
) -> None:
    """Open the checkpoint, compare it, print the result; ManifoldError if anything differs.

    against: second checkpoint and its layout. sizes: tokens and seed.
    """
    from manifold_hc.interop.layouts import open_checkpoint
    from manifold_hc.verify import compare
    from manifold_hc.verify.against import differing_weights, second_checkpoint
    from manifold_hc.verify.recorded import load_recording
    from manifold_hc.verify.references import reference_of

    known = override(Hyperparameters(), overrides)
    given = {field.name: getattr(known, field.name) for field in fields(known)}
    checkpoint = open_checkpoint(path, layout, given)
    stack = checkpoint.stack()
    weights: list[WeightDifference] = []
    source: Source
    if against[0] is not None:
        other = open_checkpoint(against[0], against[1], given)
        weights = differing_weights(checkpoint, other)
        source = second_checkpoint(checkpoint, other, *sizes)
    elif recorded is not None:
        source = load_recording(recorded, stack)
    else:
        source = reference_of(checkpoint, *sizes)
    with console(stderr=True).status("verify"):
        report = compare(stack, source)
    _print(checkpoint, report, weights)
    if json_file is not None:
        _write_json(json_file, checkpoint, report, weights)
    if weights or not report.ok:
        raise ManifoldError(_failure(checkpoint, report, weights))


def _print(checkpoint: "Checkpoint", report: "Report", weights: "list[WeightDifference]") -> None:
    config, out = checkpoint.config, console()
    rows = [
        ("checkpoint", f"{checkpoint.files.path}, layout {checkpoint.layout.name}"),
        ("connections", f"{config.numerics}, {config.constraint}, {config.iterations} iterations"),
        (
            "sizes",
            f"{config.n} streams, {checkpoint.channels} channels, {report.sublayers} sublayers",
        ),
        ("compared with", f"{report.source}, in {report.precision}"),
    ]
    if checkpoint.assumed:
        names = ", ".join(checkpoint.assumed)
        rows.append(("assumed", f"{names}: the files do not give them; KEY=VALUE does"))
    if checkpoint.layout.difference:
        rows.append(("note", checkpoint.layout.difference))
    head = Table.grid(padding=(0, 2))
    for name, text in rows:
        head.add_row(name, escape(text))
    out.print(head)
    out.print(_table(checkpoint, report))
    for one in weights[:SHOWN]:
        out.print(escape(one.sentence), soft_wrap=True)
    if len(weights) > SHOWN:
        out.print(f"parameters that differ too: {len(weights) - SHOWN}")
    for sentence in report.diagnosis.sentences if report.diagnosis else ():
        out.print(escape(sentence), soft_wrap=True)


def _table(checkpoint: "Checkpoint", report: "Report") -> Table:
    """Summarise each kind of tensor in one row."""
    table = Table(box=None, pad_edge=False)
    table.add_column("tensor")
    for column in ("compared", "largest error", "tolerance"):
        table.add_column(column, justify="right")
    for column in ("state", "first that differs"):
        table.add_column(column)
    for tensor in dict.fromkeys(one.tensor for one in report.compared):
        group = [one for one in report.compared if one.tensor == tensor]
        worst = max(group, key=lambda one: one.error / one.tolerance)
        wrong = [one for one in group if not one.ok]
        table.add_row(
            tensor,
            str(len(group)),
            f"{worst.error:.1e}",
            f"{worst.tolerance:.1e}",
            "DIFFERS" if wrong else "ok",
            escape(_place(checkpoint, wrong[0])) if wrong else "",
            style="red" if wrong else None,
        )
    return table


def _place(checkpoint: "Checkpoint", one: "Compared") -> str:
    """Name a sublayer by its number and by its name in the files."""
    from manifold_hc.interop.layouts.native import EXIT, native_name

    names = checkpoint.layout.names
    place = next(names.places(native_name(one.index, "phi")), None)
    if one.index == EXIT:
        return "exit"
    name = "" if place is None else names.name(place, checkpoint.prefix)
    return f"sublayer {one.index}{name and f' ({name})'}"


def _failure(checkpoint: "Checkpoint", report: "Report", weights: "list[WeightDifference]") -> str:
    if report.ok:
        return (
            f"verify: wanted equal weights, got {len(weights)} that differ, first "
            f"{weights[0].name}; the results agree within their tolerance"
        )
    first = report.differing[0]
    return (
        f"verify: wanted {first.tensor} of {_place(checkpoint, first)} within {first.tolerance:.1e}"
        f" of {report.source}, got an error of {first.error:.1e}"
        + (f"; {report.diagnosis.sentences[0]}" if report.diagnosis else "")
    )


def _write_json(
    file: Path, checkpoint: "Checkpoint", report: "Report", weights: "list[WeightDifference]"
) -> None:
    content = {
        "checkpoint": str(checkpoint.files.path),
        "layout": checkpoint.layout.name,
        "config": asdict(checkpoint.config),
        "assumed": checkpoint.assumed,
        "ok": report.ok and not weights,
        "report": report,
        "weights": weights,
    }
    write_atomically(file, msgspec.json.format(msgspec.json.encode(content)))
