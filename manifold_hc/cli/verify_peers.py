"""`mhc verify --peers`: our connections against the libraries that have mHC."""

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec
from rich.markup import escape
from rich.table import Table

from manifold_hc.cli.terminal import console
from manifold_hc.errors import ManifoldError
from manifold_hc.files import write_atomically

if TYPE_CHECKING:
    from manifold_hc.verify.agreement import Agreement
    from manifold_hc.verify.references import Library


def verify_peers(markdown: Path | None, json_file: Path | None) -> None:
    """Compare every library, print and write the results; ManifoldError if one disagrees."""
    from manifold_hc.bench.output import results
    from manifold_hc.verify.agreement import Agreement, agreements
    from manifold_hc.verify.agreement_page import missing_sentence, page

    found: list[Agreement] = []
    missing: list[Library] = []
    with console(stderr=True).status("verify"):
        for one in agreements():
            if isinstance(one, Agreement):
                found.append(one)
            else:
                missing.append(one)
    console().print(_table(found))
    for library in missing:
        console().print(escape(f"not installed: {missing_sentence(library)}"))
    machine = results.machine("cpu")
    if json_file is not None:
        content = {"machine": machine, "peers": found}
        write_atomically(json_file, msgspec.json.format(msgspec.json.encode(content)))
    if failed := [one for one in found if not one.ok]:
        worst = failed[0]
        raise ManifoldError(
            f"verify: wanted {worst.package} {worst.version}, {worst.part}, within "
            f"{worst.tolerance:.0e} by a known order of Sinkhorn-Knopp, got {worst.outputs:.1e} of "
            f"outputs, {worst.gradients:.1e} of gradients, order {worst.constraint}; no page is "
            "written"
        )
    if markdown is not None:
        today = f"{datetime.now(UTC):%Y-%m-%d}"
        where = f"{machine.device}, torch {machine.versions['torch']}"
        sentence = f"Written by the command below on {today}:\n{where}."
        write_atomically(markdown, page(found, missing, sentence))
        click.echo(f"written: {markdown}")


def _table(found: "list[Agreement]") -> Table:
    from manifold_hc.verify.agreement_page import INSTALLED, row

    table = Table(box=None, pad_edge=False)
    for column in (*INSTALLED[:-1], "state"):
        table.add_column(column)
    for one in found:
        cells = [*row(one)[:-1], "ok" if one.ok else "DIFFERS"]
        table.add_row(*map(escape, cells), style=None if one.ok else "red")
    return table
