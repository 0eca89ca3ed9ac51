"""Start, resume and restart of a run in its folder."""

import logging
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from manifold_hc.data import Corpus, load
from manifold_hc.errors import ConfigError, DivergedError, RunFolderError, StoppedError
from manifold_hc.parallel import (
    is_restarted,
    job_id,
    join_process_group,
    require_world_size,
)
from manifold_hc.training.checkpoint import Checkpoints
from manifold_hc.training.checkpoint_files import path_step
from manifold_hc.training.config import RunConfig, fixed_differences
from manifold_hc.training.folder import RunFolder, locked, refuse_if_in_use, resume_command
from manifold_hc.training.initial_weights import InitialWeights
from manifold_hc.training.metrics import ObserverFactory
from manifold_hc.training.preflight import Prepared, check, require_memory, warn_of_warmup
from manifold_hc.training.record import COMPARISON, record_run
from manifold_hc.training.trainer import train
from manifold_hc.training.weight_search import find_weights

logger = logging.getLogger("manifold_hc")

Resume = Literal["newest"] | int | None
"""Checkpoint to resume from: the newest, that of a step, or none for a new run."""


def run(
    config: RunConfig,
    folder: str | Path,
    *,
    resume: Resume = None,
    init: str | Path | None = None,
    drop_connections: bool = False,
    observers: Sequence[ObserverFactory] = (),
    console: Console | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """Train one model in a run folder, as `mhc train` does.

    Locks the folder, loads the text, trains, and writes metrics, checkpoints, weights and a
    summary. Under torchrun every process calls it; a run whose processes torchrun restarts resumes
    from its newest checkpoint. A script of several processes should then end with
    `manifold_hc.parallel.end_process()`.

    Args:
        config: configuration of the run; for a resumed run that of its folder, in which the keys of
            model, connection, data and seed must be unchanged.
        folder: run folder; new or empty unless `resume` is given.
        resume: "newest" for the newest intact checkpoint, or the step of one. A run without any
            checkpoint starts again from its first step.
        init: weights that a new run starts from: a run folder, whose newest checkpoint is taken,
            one of its checkpoints, or an exported model. Its model must have the sizes of
            `config`; `initial_config` returns them. Optimizer, schedule and data start anew.
            Connections that `init` lacks, as a residual run does, keep their initial values, so
            that the outputs are the same.
        drop_connections: True to start with new connections although `init` has some.
        observers: factories of observers, such as `manifold_hc.diagnostics.GainMonitor`.
        console: where progress is shown; standard error by default.
        command: command line for the record run.json; by default that of this process.

    Returns:
        The summary: validation_loss, steps, parameters, peak_memory and others.

    Raises:
        ConfigError: the configuration does not fit this machine, the number of processes, or the
            run that is resumed, or the initial weights.
        DataError: the text is missing or too short.
        BackendError: the backend does not support the device.
        RunFolderError: the folder is in use, not empty, or holds a complete run.
        CheckpointError: a checkpoint is missing, damaged, of another model or on other data.
        DivergedError: a loss or gradient is not finite; the last finite state is saved.
        StoppedError: Ctrl-C or SIGTERM; the state is saved.
        LostProcessError: another process of the run has died.

        Refusals leave the folder as it was.

    Example:
        >>> from manifold_hc import training
        >>> config = training.RunConfig(training=training.TrainingConfig(steps=3, batch=2))
        >>> summary = training.run(config, "runs/three")
        >>> summary["steps"]
        3
    """
    if resume not in (None, "newest") and (isinstance(resume, bool) or not isinstance(resume, int)):
        raise ConfigError(
            f'run: resume must be None, "newest" or the step of a checkpoint but is {resume!r}'
        )
    if init is not None and resume is not None:
        raise ConfigError("init: starts a new run, but resume goes on with one; leave one out")
    if drop_connections and init is None:
        raise ConfigError("drop_connections: belongs to init; give the weights with it")
    run_folder = RunFolder(Path(folder))
    initial = None
    if init is not None:
        initial = InitialWeights(find_weights(init), drop_connections)
        initial.require_fit(config)
    console = console or Console(stderr=True)
    command = shlex.join(sys.orig_argv) if command is None else command
    if resume is not None:
        _require_same_run(run_folder, config)
    require_world_size(config.parallel)
    require_memory(config)
    corpus = load(config.data, config.model.vocabulary, console)
    prepared = check(config, corpus)
    with join_process_group(config.parallel, prepared.device) as processes, ExitStack() as held:
        restarted = any(processes.all_gather(is_restarted()))
        checkpoints = Checkpoints(
            run_folder.checkpoints, config.checkpoint, corpus.digest, processes
        )
        if initial is not None and processes.on_rank0(
            lambda: restarted and run_folder.has_job(job_id()) and bool(checkpoints.paths())
        ):
            initial = None  # its weights are in the checkpoint of step 0
        if initial is not None:
            initial.verify(processes)
            processes.on_rank0(lambda: initial.origin)
        own = processes.on_rank0(
            lambda: _lock(run_folder, held, config, new=resume is None, restarted=restarted)
        )
        if own and processes.on_rank0(run_folder.is_complete):
            return processes.on_rank0(run_folder.summary)
        start = _find(checkpoints, run_folder, "newest" if own else resume)
        warn_of_warmup(config)
        return _train(
            config,
            corpus,
            run_folder,
            checkpoints,
            start,
            initial,
            prepared,
            observers,
            console,
            command,
        )


def _require_same_run(folder: RunFolder, config: RunConfig) -> None:
    """Raise ConfigError for a configuration that would make the resumed run another one."""
    if changed := fixed_differences(folder.config(), config):
        raise ConfigError(f"--resume: {', '.join(changed)} cannot change in a run; start another")


def _lock(
    folder: RunFolder, held: ExitStack, config: RunConfig, *, new: bool, restarted: bool
) -> bool:
    """Lock the folder until `held` closes; return True if this torchrun job already trains there.

    Raises RunFolderError, before the lock file is created, for a folder in use, for one that is not
    empty if the run is `new`, and for a complete run without more steps.
    """
    refuse_if_in_use(folder.path)
    # torchrun restarts processes after any error: only the folder shows whether the job had begun
    # its run or had been refused.
    own = restarted and folder.has_job(job_id())
    if new and not own and not folder.is_new():
        raise RunFolderError(
            f"run folder: {folder.path} is not empty; choose another with --out{_repair(folder)}"
        )
    if not new and not own and folder.is_complete():
        before = folder.config().training.steps
        if config.training.steps <= before:
            raise RunFolderError(
                f"run folder: {folder.path} holds a complete run of {before} steps; "
                "give more training.steps to go on"
            )
    held.enter_context(locked(folder.path))
    return own


def _repair(folder: RunFolder) -> str:
    """How to continue with the content of a folder that is not empty; may be empty."""
    if folder.config_file.exists():
        return f", or go on with --resume {shlex.quote(str(folder.path))}"
    if (folder.path / COMPARISON).exists():
        return ", or go on with the comparison in it by the same mhc compare command"
    return ""


def _find(checkpoints: Checkpoints, folder: RunFolder, resume: Resume) -> Path | None:
    """Find the checkpoint to resume from; None to start from the first step."""
    if resume is None:
        return None
    found = checkpoints.find(None if resume == "newest" else resume)
    if found is None and checkpoints.processes.on_rank0(folder.is_complete):
        raise RunFolderError(
            f"run folder: {folder.path} holds a complete run without a checkpoint to go on from"
        )
    if found is None:
        logger.info("going on from the first step: there is no checkpoint yet")
    return found


def _train(
    config: RunConfig,
    corpus: Corpus,
    folder: RunFolder,
    checkpoints: Checkpoints,
    start: Path | None,
    initial: InitialWeights | None,
    prepared: Prepared,
    observers: Sequence[ObserverFactory],
    console: Console,
    command: str,
) -> dict[str, Any]:
    """Train, and add advice on how to continue to the errors that end a run."""
    again = resume_command(folder.path, config)

    def record() -> None:
        record_run(folder.path, command, None if initial is None else initial.origin)

    try:
        return train(
            config,
            corpus,
            folder,
            observers,
            console,
            title=config.connection.kind,
            resume=start,
            initial=initial,
            processes=checkpoints.processes,
            on_begin=record,
            prepared=prepared,
        )
    except DivergedError as error:
        saved = [path_step(path) for path in checkpoints.paths()]
        error.add_note(_advice(error.step, saved, again))
        raise
    except StoppedError as error:
        error.add_note(f"go on with: {again}")
        raise


def _advice(failed: int, saved: list[int], again: str) -> str:
    """Return advice for a loss or gradient of step `failed` that is not finite.

    saved: steps of the checkpoints. again: command that resumes from the newest. A step computes
    loss and gradient before it uses the learning rate: from its own state it fails at any rate.
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
