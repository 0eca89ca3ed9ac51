"""`mhc train`."""

from datetime import datetime
from pathlib import Path

import click

from manifold_hc.cli.dry_run import show_plan
from manifold_hc.cli.options import (
    RunCommand,
    Wanted,
    drop_option,
    init_option,
    initial_source,
    require_init,
    run_options,
)
from manifold_hc.cli.terminal import WIDE, command_line, console
from manifold_hc.errors import ConfigError
from manifold_hc.parallel import end_process, is_rank0
from manifold_hc.training import RunConfig, RunFolder, run
from manifold_hc.training.launch import Resume


@click.command(cls=RunCommand)
@run_options
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Run folder; must be new or empty.  [default: runs/KIND-TIME]",
)
@click.option(
    "--resume",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Go on with the run in this folder, with its configuration, from its last checkpoint.",
)
@init_option
@click.option(
    "--step",
    type=int,
    metavar="N",
    help="With --resume or --init: the checkpoint to take; default the newest.",
)
@drop_option
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print parameters, tokens and learning rates; read no data, allocate no weights.",
)
def train(
    wanted: Wanted,
    out: Path | None,
    resume: Path | None,
    init: Path | None,
    step: int | None,
    drop_connections: bool,
    dry_run: bool,
) -> None:
    """Train one language model.

    \b
    mhc train --data book.txt --out runs/book connection.kind=mhc training.steps=400
    mhc train --resume runs/book
    mhc train --init runs/book --data more.txt --out runs/tuned optimizer.lr=4e-4
    mhc train --preset 27b --dry-run
    """
    if step is not None and not (resume or init):
        raise ConfigError("--step: belongs to --resume or --init; give the run folder with it")
    require_init(init, drop_connections=drop_connections)
    if resume is not None:
        if init is not None:
            raise ConfigError("--init: starts a new run; --resume needs no initial weights")
        if out or wanted.preset or wanted.config_file:
            raise ConfigError(
                "--resume: goes on in the run's own folder with its own configuration; "
                "leave out --out, --preset and --config"
            )
        config = wanted.config(RunFolder(resume).config())
        _run(config, resume, "newest" if step is None else step)
        return
    source = initial_source(wanted, init, step)
    config = wanted.config(None if source is None else source.config())
    if dry_run:
        show_plan(config)
        return
    if out is None and config.parallel.size > 1:
        raise ConfigError("--out: a run of several processes needs one, the same for all")
    path = out or Path("runs") / f"{config.connection.kind}-{datetime.now():%Y%m%d-%H%M%S}"
    _run(config, path, None, None if source is None else source.path, drop_connections)


def _run(
    config: RunConfig,
    path: Path,
    resume: Resume,
    init: Path | None = None,
    drop_connections: bool = False,
) -> None:
    """Train, and print the summary on rank 0."""
    from manifold_hc.diagnostics import GainMonitor
    from manifold_hc.report import as_table, load_runs, summarise

    run(
        config,
        path,
        resume=resume,
        init=init,
        drop_connections=drop_connections,
        observers=[GainMonitor],
        console=console(stderr=True),
        command=command_line(),
    )
    if is_rank0():
        rows = summarise(load_runs(path))
        console().print(as_table(rows, upright=console().width < WIDE))
        click.echo(f"run folder: {path}")
    if config.parallel.size > 1:
        end_process()
