"""`mhc train`."""

from datetime import datetime
from pathlib import Path

import click

from manifold_hc.cli.options import RunCommand, run_options
from manifold_hc.cli.terminal import WIDE, console
from manifold_hc.errors import DivergedError, ManifoldError, RunFolderError
from manifold_hc.training import RunConfig


@click.command(cls=RunCommand)
@run_options
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Run folder; must be new or empty.  [default: runs/KIND-TIME]",
)
def train(config: RunConfig, out: Path | None) -> None:
    """Train one language model on a text file, its bytes as tokens.

    \b
    mhc train --data book.txt --out runs/book connection.kind=mhc training.steps=400
    """
    from manifold_hc import training
    from manifold_hc.data import load as load_text
    from manifold_hc.diagnostics import GainMonitor
    from manifold_hc.report import as_table, load_runs, summarise
    from manifold_hc.training.folder import RunFolder, is_empty, locked, refuse_if_in_use

    tokens = load_text(config.data.path)
    training.check(config, tokens)
    kind = config.connection.kind
    path = out or Path("runs") / f"{kind}-{datetime.now():%Y%m%d-%H%M%S}"
    folder = RunFolder(path)
    refuse_if_in_use(path)
    if not is_empty(path):
        raise RunFolderError(f"run folder: {path} is not empty; choose another with --out")
    with locked(path):
        try:
            training.train(config, tokens, folder, [GainMonitor], console(stderr=True), kind)
        except DivergedError as error:
            raise ManifoldError(f"{error}; its metrics are in {path}") from None
        terminal = console()
        rows = summarise(load_runs(path))
        terminal.print(as_table(rows, upright=terminal.width < WIDE))
    click.echo(f"run folder: {path}")
