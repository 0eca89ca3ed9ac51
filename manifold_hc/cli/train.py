"""`mhc train`."""

from datetime import datetime
from pathlib import Path

import click

from manifold_hc.cli.keys import ConfiguredCommand, load, override
from manifold_hc.cli.terminal import console
from manifold_hc.errors import DivergedError, ManifoldError, RunFolderError
from manifold_hc.training import RunConfig


class TrainCommand(ConfiguredCommand):
    """`mhc train`, with the keys of a run."""

    configuration = RunConfig


@click.command(cls=TrainCommand)
@click.option("--data", metavar="FILE", help="UTF-8 text to train on; short for data.path=FILE.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Run folder; must be new or empty.  [default: runs/KIND-TIME]",
)
@click.option(
    "--config",
    "config_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Start from a run's config.json instead of the defaults.",
)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def train(
    data: str | None, out: Path | None, config_file: Path | None, overrides: tuple[str, ...]
) -> None:
    r"""Train one language model on a text file, its bytes as tokens.

    \b
    mhc train --data book.txt --out runs/book connection.kind=mhc training.steps=400
    """
    from manifold_hc import training
    from manifold_hc.data import load as load_text
    from manifold_hc.diagnostics import GainMonitor
    from manifold_hc.report import as_table, load_runs, summarise
    from manifold_hc.training.folder import RunFolder, locked

    config = load(RunConfig, config_file) if config_file else RunConfig()
    config = override(config, [*overrides, *([f"data.path={data}"] if data else [])])
    tokens = load_text(config.data.path)
    kind = config.connection.kind
    path = out or Path("runs") / f"{kind}-{datetime.now():%Y%m%d-%H%M%S}"
    folder = RunFolder(path)
    with locked(path):
        if not folder.is_empty():
            raise RunFolderError(f"run folder: {path} is not empty; choose another with --out")
        try:
            training.train(config, tokens, folder, [GainMonitor], console(stderr=True), kind)
        except DivergedError as error:
            raise ManifoldError(f"{error}; its metrics are in {path}") from None
        console().print(as_table(summarise(load_runs(path))))
    click.echo(f"run folder: {path}")
