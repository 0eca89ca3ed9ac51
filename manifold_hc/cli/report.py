"""`mhc report`: table and page of a run folder."""

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from manifold_hc.cli.options import json_option
from manifold_hc.cli.terminal import WIDE, console
from manifold_hc.errors import ConfigError, ManifoldError
from manifold_hc.files import write_atomically

if TYPE_CHECKING:
    from manifold_hc.report import Run

RUN_FILES = {"config.json", "summary.json", "comparison.json", "run.json"}


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="The page.  [default: FOLDER/report.html]",
)
@json_option
def report(folder: Path, out: Path | None, json_file: Path | None) -> None:
    """Make the page, the table and its CSV and JSON from a run folder's files.

    \b
    mhc report runs/compare
    """
    page = out or folder / "report.html"
    check_outputs(page, json_file)
    publish(folder, page, json_file)


def check_outputs(page: Path, json_file: Path | None) -> None:
    """Raise ConfigError if a file of the report has the name of a run's own file."""
    if page.suffix != ".html":
        raise ConfigError(f"report: --out must end in .html but is {page}")
    for file in filter(None, (page.with_suffix(".json"), json_file)):
        if file.name in RUN_FILES:
            raise ConfigError(f"report: {file} is the name of a run's own file; choose another")


def publish(folder: Path, page: Path, json_file: Path | None) -> "list[Run]":
    """Print the table of `folder`, write page, PNG, CSV and JSON, and return the runs."""
    from manifold_hc.report import as_csv, as_json, as_table, load_runs, summarise, write_page
    from manifold_hc.study.records import comparison_record
    from manifold_hc.training.record import run_record

    runs = load_runs(folder)
    rows = summarise(runs)
    figures = msgspec.json.format(msgspec.json.encode(as_json(rows, runs)))
    record = comparison_record(folder) or run_record(folder)
    name = os.fsencode(folder).decode(errors="backslashreplace")
    try:
        write_page(runs, {"folder": name, **record}, page)
        write_atomically(page.with_suffix(".csv"), as_csv(rows))
        write_atomically(page.with_suffix(".json"), figures)
    except OSError as error:
        again = f"mhc report {shlex.quote(str(folder))} --out FILE.html"
        raise ManifoldError(
            f"report: {error.filename} cannot be written: {error.strerror}; "
            f"choose another place: {again}"
        ) from None
    if json_file:
        write_atomically(json_file, figures)
    terminal = console()
    terminal.print(as_table(rows, upright=terminal.width < WIDE))
    click.echo(f"report: {page}")
    return runs
