"""`mhc verify`."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec
from rich.markup import escape
from rich.table import Table

from manifold_hc.cli.options import device_option, float64_device, json_option
from manifold_hc.cli.terminal import console
from manifold_hc.errors import ManifoldError
from manifold_hc.files import write_atomically

if TYPE_CHECKING:
    from manifold_hc.verify import Line


@click.command()
@device_option
@json_option
def verify(device: str, json_file: Path | None) -> None:
    """Check every operator on every backend, and every peer, against float64 on your device.

    \b
    mhc verify
    mhc verify --device cuda --json verify.json

    Compares outputs and all gradients, at usual and odd sizes; every tensor has the tolerance of
    its dtype. "not served": the backend does not support the call; the last lines count the skipped
    checks with their reasons. Exit status 1 if any check fails.
    """
    from manifold_hc.bench.output import results
    from manifold_hc.verify import Line, verify

    chosen = float64_device(device)
    lines: list[Line] = []
    with console(stderr=True).status("verify") as status:
        for line in verify(chosen, lambda text: status.update(escape(text))):
            lines.append(line)
    console().print(_table(lines))
    for line in lines:
        if line.reason and line.state != "not served":
            console().print(escape(f"{line.name}, {line.dtype}: {line.state}: {line.reason}"))
    ran = [line for line in lines if line.state in ("ok", "FAILED")]
    failed = [line for line in lines if line.state == "FAILED"]
    for summary in skipped(lines):
        console().print(escape(summary), soft_wrap=True)
    click.echo(f"{len(ran)} checks ran on {chosen}, {len(failed)} failed")
    if json_file:
        content = {"machine": results.machine(chosen), "checks": lines}
        write_atomically(json_file, msgspec.json.format(msgspec.json.encode(content)))
    if failed:
        raise ManifoldError(
            f"verify: wanted every check within its tolerance, {len(failed)} of {len(ran)} are "
            f"not, the first is {failed[0].name} by {failed[0].backend} in {failed[0].dtype}; "
            'use backend="reference" until it is repaired, and report it with `mhc info`'
        )


def skipped(lines: "list[Line]") -> list[str]:
    """Return a line for each backend or peer with skipped checks: their number and the reasons."""
    reasons: dict[str, Counter[str]] = {}
    for line in lines:
        if line.state in ("not served", "not installed"):
            name = line.backend if line.state == "not served" else line.name
            reason = line.reason.partition(f'backend "{line.backend}" ')[2] or line.reason
            reasons.setdefault(name, Counter())[reason] += 1
    return [
        f"{counts.total()} skipped, {name}: {'; '.join(counts)}" for name, counts in reasons.items()
    ]


def _table(lines: "list[Line]") -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("check", "backend", "dtype"):
        table.add_column(column)
    for column in ("largest relative error", "tolerance"):
        table.add_column(column, justify="right")
    table.add_column("state")
    for line in lines:
        failed = line.state == "FAILED"
        table.add_row(
            *map(escape, (line.name, line.backend, line.dtype)),
            "-" if line.error is None else f"{line.error:.1e}",
            "-" if line.tolerance is None else f"{line.tolerance:.0e}",
            line.state,
            style="red" if failed else None,
        )
    return table
