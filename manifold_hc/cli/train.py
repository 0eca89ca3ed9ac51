"""`mhc train`."""

import logging
import os
import shlex
import sys
from collections.abc import Callable
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from manifold_hc.cli.dry_run import show_plan
from manifold_hc.cli.options import RunCommand, Wanted, run_options
from manifold_hc.cli.terminal import WIDE, command_line, console
from manifold_hc.errors import ConfigError, DivergedError, RunFolderError, StoppedError
from manifold_hc.parallel import Processes, is_restarted, job, joined, require_started
from manifold_hc.training import Checkpoints, RunConfig, RunFolder
from manifold_hc.training.config import fixed_differences

if TYPE_CHECKING:
    from manifold_hc.data import Corpus

logger = logging.getLogger("manifold_hc")


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
@click.option("--step", type=int, metavar="N", help="With --resume: the checkpoint to go on from.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print parameters, tokens and learning rates; read no data, allocate no weights.",
)
def train(
    wanted: Wanted, out: Path | None, resume: Path | None, step: int | None, dry_run: bool
) -> None:
    """Train one language model.

    \b
    mhc train --data book.txt --out runs/book connection.kind=mhc training.steps=400
    mhc train --resume runs/book
    mhc train --preset 27b --dry-run
    """
    if step is not None and resume is None:
        raise ConfigError("--step: belongs to --resume; give the run folder with it")
    if resume is not None:
        _resume(wanted, resume, out, step)
        return
    config = wanted.config()
    if dry_run:
        show_plan(config)
        return
    if out is None and config.parallel.size > 1:
        raise ConfigError("--out: a run of several processes needs one, the same for all")
    path = out or Path("runs") / f"{config.connection.kind}-{datetime.now():%Y%m%d-%H%M%S}"
    _run(config, RunFolder(path))


def _resume(wanted: Wanted, path: Path, out: Path | None, step: int | None) -> None:
    """Go on where the run in `path` stands, its keys changed only where that is the same run."""
    if out or wanted.preset or wanted.config_file:
        raise ConfigError(
            "--resume: goes on in the run's own folder with its own configuration; "
            "leave out --out, --preset and --config"
        )
    folder = RunFolder(path)
    before = folder.config()
    config = wanted.config(before)
    if changed := fixed_differences(before, config):
        raise ConfigError(f"--resume: {', '.join(changed)} cannot change in a run; start another")
    _run(config, folder, lambda checkpoints: checkpoints.find(step))


def _run(
    config: RunConfig,
    folder: RunFolder,
    find: Callable[[Checkpoints], Path | None] | None = None,
) -> None:
    """Train in `folder`, which must be empty, or go on from the checkpoint that `find` gives."""
    from manifold_hc import training
    from manifold_hc.data import load
    from manifold_hc.report import as_table, load_runs, summarise

    path = folder.path
    require_started(config.parallel)
    training.require_memory(config)
    corpus = load(config.data, config.model.vocabulary, console(stderr=True))
    device = training.check(config, corpus).device
    with joined(config.parallel, device) as processes, ExitStack() as held:
        restarted = any(processes.all_gather(is_restarted()))
        again = processes.on_rank0(
            lambda: _take(folder, held, config, new=find is None, restarted=restarted)
        )
        if not (again and processes.on_rank0(folder.is_complete)):
            _train(config, corpus, folder, processes, Checkpoints.find if again else find)
        if processes.is_first:
            rows = summarise(load_runs(path))
            console().print(as_table(rows, upright=console().width < WIDE))
            click.echo(f"run folder: {path}")
    if config.parallel.size > 1:
        _leave()


def _leave() -> None:
    """End the process, and let the interpreter be.

    A thread of gloo may still hold a tensor of the last exchange, and would abort the process when
    it lets go of it while the interpreter ends (github.com/pytorch/pytorch/pull/179291).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _take(
    folder: RunFolder, held: ExitStack, config: RunConfig, *, new: bool, restarted: bool
) -> bool:
    """Lock the folder until `held` ends; whether torchrun has started its own run again.

    Raises RunFolderError for a folder in use, for one that is not empty where a `new` run starts,
    and for a complete run.
    """
    from manifold_hc.training.folder import locked, refuse_if_in_use

    refuse_if_in_use(folder.path)
    again = restarted and folder.is_of(job())
    if new and not again and not folder.is_new():
        raise RunFolderError(
            f"run folder: {folder.path} is not empty; choose another with --out{_or_go_on(folder)}"
        )
    if not new and not again and folder.is_complete():
        before = folder.config().training.steps
        if config.training.steps <= before:
            raise RunFolderError(
                f"run folder: {folder.path} holds a complete run of {before} steps; "
                "give more training.steps to go on"
            )
    held.enter_context(locked(folder.path))
    return again


def _or_go_on(folder: RunFolder) -> str:
    """How to go on with what a folder that is not empty holds; empty where nothing can."""
    from manifold_hc.compare import COMPARISON

    if folder.config_file.exists():
        return f", or go on with --resume {shlex.quote(str(folder.path))}"
    if (folder.path / COMPARISON).exists():
        return ", or go on with the comparison in it by the same mhc compare command"
    return ""


def _train(
    config: RunConfig,
    corpus: "Corpus",
    folder: RunFolder,
    processes: Processes,
    find: Callable[[Checkpoints], Path | None] | None,
) -> None:
    from manifold_hc import training
    from manifold_hc.compare import record_run
    from manifold_hc.diagnostics import GainMonitor
    from manifold_hc.training.checkpoint_files import path_step
    from manifold_hc.training.folder import resume_command
    from manifold_hc.training.trainer import warn_of_warmup

    at, path = None, folder.path
    checkpoints = Checkpoints(folder.checkpoints, config.checkpoint, corpus.digest, processes)
    if find is not None:
        at = find(checkpoints)
        if at is None and processes.on_rank0(folder.is_complete):
            raise RunFolderError(
                f"run folder: {path} holds a complete run without a checkpoint to go on from"
            )
        if at is None:
            logger.info("going on from the first step: there is no checkpoint yet")
    kind, again = config.connection.kind, resume_command(path, config)
    screen = console(stderr=True)

    def record() -> None:
        record_run(path, command_line())

    warn_of_warmup(config)
    try:
        training.train(config, corpus, folder, [GainMonitor], screen, kind, at, processes, record)
    except DivergedError as error:
        saved = [path_step(found) for found in checkpoints.paths()]
        error.add_note(_advice(error.step, saved, again))
        raise
    except StoppedError as error:
        error.add_note(f"go on with: {again}")
        raise


def _advice(failed: int, saved: list[int], again: str) -> str:
    """What may help where the loss or gradient of step `failed` is not finite.

    saved: the steps of the checkpoints. again: the command that goes on from the newest. A step
    computes loss and gradient before the rate is read: from its own state it fails at any rate.
    """
    if failed == 0:
        return (
            "no update came before it, so that no rate is to blame but the configuration itself "
            "(initial weights, connection.alpha, data); start another run with another one"
        )
    if failed not in saved:
        return f"lower the rate: {again} optimizer.lr=R"
    beyond = f"the state saved as step {failed} is beyond repair, whatever the rate"
    if older := [step for step in saved if step < failed]:
        before = f"{again} --step {max(older)} optimizer.lr=R"
        return f"{beyond}; lower it from before that: {before}, or in another run"
    return f"{beyond}; start another run with a lower one"
