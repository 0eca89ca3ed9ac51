"""The training loop, the same on every rank."""

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from signal import Signals
from typing import Any

from rich.console import Console

from manifold_hc.data import Corpus
from manifold_hc.errors import (
    CheckpointError,
    ConfigError,
    DivergedError,
    ManifoldError,
    RunFolderError,
    StoppedError,
)
from manifold_hc.files import retry_write
from manifold_hc.models import balance
from manifold_hc.parallel import Processes, job_id
from manifold_hc.training import checkpoint_files
from manifold_hc.training.batch_slice import rank_slice
from manifold_hc.training.checkpoint import Checkpoints
from manifold_hc.training.config import RunConfig
from manifold_hc.training.device import deterministic, peak_memory
from manifold_hc.training.expert_load import load_figures
from manifold_hc.training.folder import RunFolder
from manifold_hc.training.initial_weights import InitialWeights
from manifold_hc.training.metrics import Metrics, ObserverFactory
from manifold_hc.training.preflight import Prepared, check
from manifold_hc.training.run_tokenizer import save_tokenizer
from manifold_hc.training.sinks import open_sinks
from manifold_hc.training.state import TrainState
from manifold_hc.training.step import take_step
from manifold_hc.training.stopping import StopRequest, stop_requests
from manifold_hc.training.validation import validate

logger = logging.getLogger("manifold_hc")


def train(
    config: RunConfig,
    corpus: Corpus,
    folder: RunFolder,
    observers: Sequence[ObserverFactory] = (),
    console: Console | None = None,
    title: str = "train",
    resume: Path | None = None,
    initial: InitialWeights | None = None,
    processes: Processes | None = None,
    on_begin: Callable[[], object] = lambda: None,
    prepared: Prepared | None = None,
) -> dict[str, Any]:
    """Train one model on `corpus`; write metrics, checkpoints, weights and a summary.

    `training.run` adds the lock of the folder, the choice of the checkpoint and restarts.

    Args:
        config: configuration of the run.
        corpus: training and validation text.
        folder: where the run writes; the caller holds its lock.
        observers: factories of observers, called with the probe batch [B, T].
        console: where progress is shown; standard error by default.
        title: name of the run in the progress view.
        resume: checkpoint of the same run, as `Checkpoints.find` returns it. The losses equal those
            of an uninterrupted run, to the bit on the same device, threads and torch.
        initial: weights of a new run, in place of random ones. They are saved as the checkpoint of
            step 0, so that the run can be resumed without them.
        processes: ranks of the run, all of which call this function; rank 0 writes.
        on_begin: called on rank 0 after all refusals, when the folder is begun.
        prepared: result of `check`, if the caller has it.

    Returns:
        The summary of the run.

    Raises:
        ManifoldError: as `check`, before anything is written.
        CheckpointError: `resume` is of another model or on other data; nothing is written.
        DivergedError: a loss or gradient is not finite; the last finite state is saved.
        StoppedError: Ctrl-C or SIGTERM; the state is saved.
    """
    prepared = prepared or check(config, corpus)
    processes = processes or Processes()
    if processes.size != config.parallel.size:
        raise ConfigError(
            f"parallel: this run needs {config.parallel.size} processes but has {processes.size}; "
            "join them with manifold_hc.parallel.join_process_group"
        )
    with processes.phase("start, building the model"):
        state = TrainState(config, prepared.device, processes)
    checkpoints = Checkpoints(folder.checkpoints, config.checkpoint, corpus.digest, processes)
    if resume is not None:
        _restore(state, resume, corpus.digest, folder)
        logger.info("going on from %s", resume)
    elif initial is not None:
        with processes.phase("start, loading the initial weights"):
            initial.load(state)
        _save_initial(state, checkpoints, folder)
    processes.on_rank0(lambda: _begin(folder, checkpoints, state))
    processes.on_rank0(on_begin)
    if processes.size > 1:
        processes.on_every_rank(lambda: folder.require_shared(config))
        processes.on_every_rank(checkpoints.require_writable)
    probe = rank_slice(prepared.validation, 0, processes).inputs.to(prepared.device)
    watching = [make(probe) for make in observers]
    screen = console or Console(stderr=True)
    # Rank 0 alone has sinks; observers run on every rank, since they use collectives.
    sinks = open_sinks(folder, config.training, screen, title, state.step, processes)
    with Metrics(sinks, watching) as metrics, deterministic(state.device), stop_requests() as stop:
        _fit(state, prepared, metrics, checkpoints, stop)
        return _finish(state, folder, checkpoints, stop)


def _fit(
    state: TrainState,
    data: Prepared,
    metrics: Metrics,
    checkpoints: Checkpoints,
    stop: StopRequest,
) -> None:
    """Train until the last step; raise StoppedError after a stop request."""
    config, processes = state.config, state.processes
    while state.step < config.training.steps:
        step = state.step
        with processes.phase(f"step {step}"):
            start = time.perf_counter()
            with processes.phase("data"):
                checkpoints.finish_pending()
                batch = rank_slice(data.training, state.sequences, processes).to(state.device)
            try:
                figures = take_step(state, batch, config)._asdict()
            except DivergedError as error:
                _save_last_finite(state, checkpoints, error)
                raise
            loads = balance(state.model, processes.all_reduce_data)
            tokens = batch.inputs.numel() * processes.dp_size * processes.tp_size
            seconds = time.perf_counter() - start
            metrics.step(
                step, figures | {"seconds": seconds, "tokens_per_second": tokens / seconds}
            )

            last = state.step == config.training.steps
            validation_loss = None
            if last or state.step % config.training.validate_every == 0:
                validation_loss = validate(state, data.validation)
                metrics.validation(step, validation_loss)
            if last or step % config.training.probe_every == 0:
                with processes.phase("stability figures"):
                    if config.model.experts.routed:
                        pairs = tokens * config.model.experts.active
                        metrics.experts(step, load_figures(loads, state.model, pairs))
                    metrics.observe(step, state.model)
            metrics.end_step(step)

            signal = processes.agree_on_signal(stop.signal)
            best = state.record_best(validation_loss)
            due = checkpoints.is_due(state.step, best=best)
            ends = last or signal is not None
            saved = (due or ends) and checkpoints.save(state, validation_loss, wait=ends)
            if signal and not last:
                raise StoppedError(state.step, signal, bool(saved))


def _finish(
    state: TrainState, folder: RunFolder, checkpoints: Checkpoints, stop: StopRequest
) -> dict[str, Any]:
    """Write the results of a run, retrying on a full disk; return the summary."""
    processes = state.processes
    with processes.phase("end"):
        processes.report("gathering the weights")
        weights = state.weights()
        size = sum(processes.all_gather_pp(sum(p.numel() for p in state.model.parameters())))
        peak = max(processes.all_gather(peak_memory(state.device)))
        known = {"parameters": size, "peak_memory": peak}
        summary = processes.on_rank0(lambda: folder.figures() | known)
        # In this order: the summary marks the run as complete.
        files = {
            "the metrics": lambda: processes.on_rank0(folder.records.flush),
            "the weights": lambda: processes.on_rank0(lambda: folder.save_model(weights)),
            "the last checkpoint": lambda: checkpoints.write(state),
            "the summary": lambda: processes.on_rank0(lambda: folder.finish(summary)),
        }

        def stop_signal(name: str) -> Signals | None:
            processes.report(name)  # a wait for room on the disk is progress to the watchdog
            return processes.agree_on_signal(stop.signal)

        try:
            for name, write in files.items():
                processes.report(name)
                retry_write(write, name, partial(stop_signal, name))
        except OSError as error:
            if signal := processes.agree_on_signal(stop.signal):
                raise StoppedError(state.step, signal, saved=False) from None
            raise ManifoldError(
                f"run folder: {name} cannot be written in {folder.path}: {error.strerror}; "
                "mend that and go on with --resume"
            ) from None
    return summary


def _save_initial(state: TrainState, checkpoints: Checkpoints, folder: RunFolder) -> None:
    """Save the initial weights as the checkpoint of step 0; a collective call.

    It comes before the configuration is written, which makes a folder one that can be resumed.
    """

    def prepare() -> None:
        checkpoints.require_writable()
        if state.processes.size > 1:
            folder.set_job(job_id())

    state.processes.on_rank0(prepare)
    try:
        checkpoints.write(state)
    except OSError as error:
        raise RunFolderError(
            f"checkpoint: the initial weights cannot be saved in {checkpoints.folder} "
            f"({error.strerror}); make room there, or choose another run folder"
        ) from None


def _begin(folder: RunFolder, checkpoints: Checkpoints, state: TrainState) -> None:
    """Begin the run in its folder, on rank 0, after all refusals."""
    checkpoints.require_writable()
    distributed = state.processes.size > 1
    # The job's identity is written before the configuration: processes that torchrun restarts in
    # between must recognise the folder as their own.
    if distributed and not state.step:
        folder.set_job(job_id())
    folder.begin(state.config, state.step)
    save_tokenizer(folder.path, state.config.data)
    folder.clean()
    checkpoints.clean()
    checkpoints.abandon_after(state.step)
    # From here on a restart of the same job resumes from the newest checkpoint.
    if distributed:
        folder.set_job(job_id())


def _restore(state: TrainState, path: Path, digest: str, folder: RunFolder) -> None:
    """Load a checkpoint; raise for other data, another model, or no steps left."""
    found = checkpoint_files.read_manifest(path).data_sha256
    if found != digest:
        raise CheckpointError(
            f"checkpoint: {path} was made on other data; "
            "the text has changed since, or data.paths names another"
        )
    checkpoint_files.load(path, state)
    steps = state.config.training.steps
    # At its last step a run may still lack the files of its end, but not its last validation.
    if state.step > steps or (state.step == steps and not folder.has_validation(steps - 1)):
        raise ConfigError(
            f"training.steps: must be above {state.step}, where the checkpoint is, but is {steps}"
        )


def _save_last_finite(state: TrainState, checkpoints: Checkpoints, error: DivergedError) -> None:
    """Save the state before the failed step if it is finite; note the newest checkpoints.

    Before the first step there is nothing to save: the seed reproduces that state.
    """
    processes = state.processes
    try:
        checkpoints.finish_pending(wait=True)
    except ManifoldError as failed:
        logger.error("%s", failed)
    before = processes.on_rank0(checkpoints.paths)
    try:
        if state.step and state.is_finite():
            # Drops no older one: the cause of the failure may be in these weights already.
            checkpoints.write(state)
    except OSError as failed:
        logger.error("CHECKPOINT NOT SAVED at step %d: %s", state.step, failed.strerror)
    saved = [checkpoint_files.path_step(path) for path in processes.on_rank0(checkpoints.paths)]
    where = f"saved as step {saved[-1]}" if saved else "not saved"
    error.add_note(f"the last finite state is {where}")
    if older := [step for path in before if (step := checkpoint_files.path_step(path)) < saved[-1]]:
        error.add_note(f"before it there is step {older[-1]}")
