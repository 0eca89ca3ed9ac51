"""`mhc verify --checkpoint`: our forward pass against another implementation."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec
from rich.markup import escape
from rich.table import Table

from manifold_hc.cli.convert import Hyperparameters
from manifold_hc.cli.keys import override
from manifold_hc.cli.terminal import console
from manifold_hc.cli.verify_errors import invalid_where_not_compared
from manifold_hc.errors import ManifoldError
from manifold_hc.files import write_atomically

if TYPE_CHECKING:
    from manifold_hc.interop.layouts import Checkpoint
    from manifold_hc.stack import Stack
    from manifold_hc.verify import Compared, Report, Source
    from manifold_hc.verify.against import WeightDifference
    from manifold_hc.verify.rounding import Rounded

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

    Where nothing could be compared the error is a ClickException. against: second checkpoint and
    its layout. sizes: tokens and seed.
    """
    with invalid_where_not_compared():
        known = override(Hyperparameters(), overrides)
        given = {field.name: getattr(known, field.name) for field in fields(known)}
        checkpoint = _open(path, layout, given)
        if against[0] is not None:
            result = _against(checkpoint, _open(*against, given), sizes)
        else:
            result = _with_source(checkpoint, recorded, sizes)
        _print(result)
        if json_file is not None:
            _write_json(json_file, result)
    if not result.ok:
        raise ManifoldError(_failure(result))


@dataclass(frozen=True)
class _Result:
    """A compared checkpoint."""

    checkpoint: "Checkpoint"
    report: "Report"
    weights: "Sequence[WeightDifference]" = ()
    """Parameters that differ from those of the second checkpoint."""
    rounded: "Rounded | None" = None
    """Parameters that differ from those of the second checkpoint by rounding alone."""

    @property
    def ok(self) -> bool:
        """True if nothing differs."""
        return self.report.ok and not self.weights


def _open(path: Path | None, layout: str | None, given: dict[str, Any]) -> "Checkpoint":
    """Open a checkpoint and check that its weights are finite."""
    from manifold_hc.interop.layouts import open_checkpoint
    from manifold_hc.verify.finite import require_finite

    checkpoint = open_checkpoint(cast(Path, path), layout, given)
    require_finite(checkpoint)
    return checkpoint


def _against(own: "Checkpoint", other: "Checkpoint", sizes: tuple[int, int]) -> _Result:
    """Compare with a second checkpoint, both with the narrower weights."""
    from manifold_hc.verify.against import differing_weights, second_checkpoint
    from manifold_hc.verify.rounding import round_together

    rounded = round_together(own, other)
    weights = differing_weights(rounded.own, rounded.other)
    source = second_checkpoint(rounded.own, rounded.other, *sizes)
    return _Result(own, _compare(rounded.own.stack(), source), weights, rounded)


def _with_source(
    checkpoint: "Checkpoint", recorded: Path | None, sizes: tuple[int, int]
) -> _Result:
    """Compare with a recording, or for None with the reference implementation."""
    from manifold_hc.verify.recorded import load_recording
    from manifold_hc.verify.references import reference_of

    stack = checkpoint.stack()
    source: Source
    if recorded is not None:
        source = load_recording(recorded, stack)
    else:
        source = reference_of(checkpoint, *sizes)
    return _Result(checkpoint, _compare(stack, source))


def _compare(stack: "Stack", source: "Source") -> "Report":
    from manifold_hc.verify import compare

    with console(stderr=True).status("verify"):
        return compare(stack, source)


def _print(result: _Result) -> None:
    checkpoint, report, weights = result.checkpoint, result.report, result.weights
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
    if result.rounded is not None and result.rounded.dtypes:
        count = len(result.rounded.dtypes)
        rows.append(("rounded", f"{count} parameters, on both sides, to the narrower dtype"))
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
    if result.ok and result.rounded is not None and result.rounded.dtypes:
        out.print(result.rounded.sentence)


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


def _failure(result: _Result) -> str:
    checkpoint, report, weights = result.checkpoint, result.report, result.weights
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


def _write_json(file: Path, result: _Result) -> None:
    checkpoint = result.checkpoint
    content = {
        "checkpoint": str(checkpoint.files.path),
        "layout": checkpoint.layout.name,
        "config": asdict(checkpoint.config),
        "assumed": checkpoint.assumed,
        "ok": result.ok,
        "report": result.report,
        "weights": result.weights,
        "rounded": result.rounded.dtypes if result.rounded is not None else {},
    }
    write_atomically(file, msgspec.json.format(msgspec.json.encode(content)))
