"""The training loop, the same in every process of a run."""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from signal import Signals
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn

from manifold_hc.data import Batch, Batches, Corpus
from manifold_hc.data.tokenizer import require_vocabulary
from manifold_hc.errors import (
    CheckpointError,
    ConfigError,
    DivergedError,
    ManifoldError,
    StoppedError,
)
from manifold_hc.files import insist
from manifold_hc.kernels import pick
from manifold_hc.models import balance, mixtures
from manifold_hc.parallel import Processes, in_depth_order, job
from manifold_hc.training import checkpoint_files
from manifold_hc.training.checkpoint import Checkpoints
from manifold_hc.training.config import RunConfig
from manifold_hc.training.folder import RunFolder
from manifold_hc.training.journal import Journal, ObserverFactory, require_tensorboard
from manifold_hc.training.size import require_room
from manifold_hc.training.state import TrainState
from manifold_hc.training.step import count_targets, loss_of, take_step
from manifold_hc.training.stopping import StopRequest, stop_requests

logger = logging.getLogger("manifold_hc")


class Ready(NamedTuple):
    """What a run needs to start."""

    training: Batches
    validation: Batches
    device: torch.device


def train(
    config: RunConfig,
    corpus: Corpus,
    folder: RunFolder,
    observers: Sequence[ObserverFactory] = (),
    console: Console | None = None,
    title: str = "train",
    resume: Path | None = None,
    processes: Processes | None = None,
    on_begin: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Train one model on `corpus` and leave metrics, checkpoints, weights and a summary.

    resume: a checkpoint of the same run, as `Checkpoints.find` gives it, to go on from; losses are
    then those of a run never interrupted, to the bit on the same device, threads and torch.
    processes: those that share the run, all of which call this; the first one writes.
    on_begin: called by the first process when nothing is refused any more and the folder is begun.

    Returns the summary. Raises what `check` raises, and CheckpointError for a checkpoint of another
    model or other data, before anything is written; DivergedError at the first loss or gradient
    that is not finite and StoppedError after Ctrl-C or SIGTERM, both when the state is saved.
    """
    ready = check(config, corpus)
    processes = processes or Processes()
    if processes.size != config.parallel.size:
        raise ConfigError(
            f"parallel: this run needs {config.parallel.size} processes but has {processes.size}; "
            "meet them with manifold_hc.parallel.joined"
        )
    processes.at("start, building the model")
    state = TrainState(config, ready.device, processes)
    digest = corpus.digest
    checkpoints = Checkpoints(folder.checkpoints, config.checkpoint, digest, processes)
    if resume is not None:
        _go_on(state, resume, digest, folder)
        logger.info("going on from %s", resume)
    processes.on_rank0(lambda: _begin(config, folder, checkpoints, state))
    processes.on_rank0(on_begin)
    if processes.size > 1:
        processes.each(lambda: folder.require_shared(config))
        processes.each(checkpoints.require_writable)
    budget = config.training
    probe = own_part(ready.validation, 0, processes).inputs.to(ready.device)
    watching = [make(probe) for make in observers]
    screen = console or Console(stderr=True)
    records = folder if processes.is_first else None
    journal = Journal(records, budget, watching, screen, title, state.step)
    with closing(journal), _deterministic(ready.device), stop_requests() as stop:
        journal.open()
        while state.step < budget.steps:
            start = time.perf_counter()
            step = state.step
            processes.at(f"step {step}, data")
            checkpoints.settle()
            batch = own_part(ready.training, state.sequences, processes).to(ready.device)
            try:
                figures = take_step(state, batch, config)._asdict()
            except DivergedError as error:
                _save_last_finite(state, checkpoints, error)
                raise
            loads = balance(state.model, processes.all_reduce_data)
            tokens = batch.inputs.numel() * processes.dp_size * processes.tp_size
            seconds = time.perf_counter() - start
            figures |= {"seconds": seconds, "tokens_per_second": tokens / seconds}
            journal.step(step, figures)

            last = state.step == budget.steps
            validation = None
            if last or state.step % budget.validate_every == 0:
                validation = validate(state, ready.validation)
                journal.validation(step, validation)
            if last or step % budget.probe_every == 0:
                processes.at(f"step {step}, stability figures")
                if config.model.experts.routed:
                    visits = tokens * config.model.experts.active
                    journal.experts(step, load_figures(loads, state.model, visits))
                journal.observe(step, state.model)
            journal.show(step)

            asked, best = processes.asked(stop.signal), state.improves(validation)
            due = checkpoints.is_due(state.step, best=best)
            end = bool(asked or last)
            saved = (due or end) and checkpoints.save(state, validation, wait=end)
            if asked and not last:
                raise StoppedError(state.step, asked, bool(saved))
        return _finish(state, folder, checkpoints, stop)


def _finish(
    state: TrainState, folder: RunFolder, checkpoints: Checkpoints, stop: StopRequest
) -> dict[str, Any]:
    """Write what a run ends with, waiting for room on the disk; returns the summary."""
    processes = state.processes
    processes.at("end, gathering the weights")
    weights = state.weights()
    size = sum(processes.all_gather_pp(sum(p.numel() for p in state.model.parameters())))
    peak = max(processes.all_gather(peak_memory(state.device)))
    known = {"parameters": size, "peak_memory": peak}
    summary = processes.on_rank0(lambda: folder.figures() | known)
    files = {
        "the metrics": lambda: processes.on_rank0(folder.flush),
        "the weights": lambda: processes.on_rank0(lambda: folder.save_model(weights)),
        "the last checkpoint": lambda: checkpoints.write(state),
        "the summary": lambda: processes.on_rank0(lambda: folder.finish(summary)),
    }

    def is_asked(what: str) -> Signals | None:
        processes.at(f"end, {what}")
        return processes.asked(stop.signal)

    try:
        for what, write in files.items():
            processes.at(f"end, {what}")
            insist(write, what, partial(is_asked, what))
    except OSError as error:
        if asked := processes.asked(stop.signal):
            raise StoppedError(state.step, asked, saved=False) from None
        raise ManifoldError(
            f"run folder: {what} cannot be written in {folder.path}: {error.strerror}; "
            "mend that and go on with --resume"
        ) from None
    return summary


def check(config: RunConfig, corpus: Corpus) -> Ready:
    """What a run needs to start, without starting it.

    Builds the CPU kernels if this machine has none yet: that takes longer than the processes of a
    run may wait for one another.
    Raises DataError for a text too short or ids outside the vocabulary, ConfigError for a device
    that torch does not find or a tracker that is not installed, BackendError for a backend that
    cannot serve.
    """
    require_vocabulary(corpus.tokenizer, corpus.vocabulary, config.model.vocabulary)
    if config.training.tensorboard:
        require_tensorboard()
    data, training = config.data, config.training
    size = (data.sequence, training.batch, training.seed)
    seen, held_out = (
        Batches(part, *size, mask_documents=data.mask_documents)
        for part in corpus.split(data.sequence, data.validation)
    )
    device = find_device(training.device)
    connection = config.connection
    if connection.kind != "residual":
        pick("read", connection.backend, connection.n, [torch.empty(0, device=device)])
    return Ready(seen, held_out, device)


def require_memory(config: RunConfig) -> None:
    """Raise ConfigError where the model's weights and their state exceed the device's memory."""
    parallel = config.parallel
    shares = parallel.pipeline * parallel.shard * parallel.tensor
    device = find_device(config.training.device)
    require_room(config.model, config.connection, device, shares)


def warn_of_warmup(config: RunConfig) -> None:
    """Log a run that ends before its warm-up does, or with it: no step after it has the rate."""
    steps, warmup = config.training.steps, config.optimizer.warmup
    if steps <= warmup:
        logger.warning(
            "training.steps=%d is all warm-up: optimizer.warmup=%d; "
            "set it lower for a run that trains at optimizer.lr",
            steps,
            warmup,
        )


def own_part(batches: Batches, first: int, processes: Processes) -> Batch:
    """What this process has of the batch that begins with sequence `first`."""
    size = batches.batch // processes.dp_size
    return batches.take(first + size * processes.dp_rank, size).span(
        processes.tp_rank, processes.tp_size
    )


@torch.no_grad()
def validate(state: TrainState, batches: Batches) -> float:
    """Mean loss over `training.validation_batches`, or over one epoch where that is fewer."""
    model, processes, training = state.model, state.processes, state.config.training
    model.eval()
    most = max(1, batches.count // batches.batch)
    loss = torch.zeros((), dtype=torch.float64, device=state.device)
    targets = torch.zeros((), dtype=torch.int64, device=state.device)
    for number in range(min(training.validation_batches, most)):
        processes.at(f"step {state.step}, validation batch {number}")
        part = own_part(batches, number * batches.batch, processes)
        for piece in part.to(state.device).pieces(training.accumulate):
            count = count_targets(piece.targets)
            loss += loss_of(model, piece, training.precision).double() * count
            targets += count
    model.train()
    total = processes.all_reduce(loss).item()
    return total / max(1, processes.all_reduce_data(targets).item())


def load_figures(loads: list[Tensor], model: nn.Module, visits: int) -> dict[str, Any]:
    """`load` by layer and expert in a step, and how far from even it is.

    loads: of the mixtures of `model`. visits: how many tokens each of all layers' experts should
    have seen together. largest_load, smallest_load: over all layers, in units of an even load.
    dropped_tokens: visits that should have been and were not.
    """
    here = zip(mixtures(model), loads, strict=True)
    load = in_depth_order(model, [(_sublayer(name), load.tolist()) for name, load in here])
    evens = [sum(layer) / len(layer) for layer in load]
    return {
        "load": load,
        "largest_load": max(max(layer) / even for layer, even in zip(load, evens, strict=True)),
        "smallest_load": min(min(layer) / even for layer, even in zip(load, evens, strict=True)),
        "dropped_tokens": visits * len(load) - sum(map(sum, load)),
    }


def _sublayer(name: str) -> int:
    """The number in the name of a branch."""
    return int(name.rpartition(".")[2])


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has had on the device so far; 0 where nobody counts them."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu" or find_spec("resource") is None:
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def find_device(name: str) -> torch.device:
    """The device called `name`; "auto" prefers CUDA (or ROCm), then MPS, then the CPU.

    Raises ConfigError for a device that torch does not find.
    """
    found = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(device for device, available in found.items() if available)
    if not found[name]:
        raise ConfigError(f'device: torch finds no {name} here; use device="cpu" or "auto"')
    return torch.device(name)


def _begin(
    config: RunConfig, folder: RunFolder, checkpoints: Checkpoints, state: TrainState
) -> None:
    # From here on the same job, started again, takes the newest checkpoint.
    checkpoints.require_writable()
    several = state.processes.size > 1
    if several and not state.step:
        folder.belong_to(job())
    folder.begin(config, state.step)
    folder.clean()
    checkpoints.clean()
    checkpoints.abandon_after(state.step)
    if several:
        folder.belong_to(job())


def _go_on(state: TrainState, path: Path, digest: str, folder: RunFolder) -> None:
    found = checkpoint_files.read_manifest(path).data_sha256
    if found != digest:
        raise CheckpointError(
            f"checkpoint: {path} was made on other data; "
            "the text has changed since, or data.paths names another"
        )
    checkpoint_files.load(path, state)
    steps = state.config.training.steps
    if state.step > steps or (state.step == steps and not folder.has_validation(steps - 1)):
        raise ConfigError(
            f"training.steps: must be above {state.step}, where the checkpoint is, but is {steps}"
        )


def _save_last_finite(state: TrainState, checkpoints: Checkpoints, error: DivergedError) -> None:
    """The state before the step that failed; where that is not finite either, say what is left.

    Before the first step there is nothing to save: the seed gives that state again.
    """
    processes = state.processes
    try:
        checkpoints.settle(wait=True)
    except ManifoldError as failed:
        logger.error("%s", failed)
    before = processes.on_rank0(checkpoints.paths)
    try:
        if state.step and state.is_finite():
            checkpoints.write(state)  # drops none: what made it fail may be in its weights already
    except OSError as failed:
        logger.error("CHECKPOINT NOT SAVED at step %d: %s", state.step, failed.strerror)
    there = [checkpoint_files.path_step(path) for path in processes.on_rank0(checkpoints.paths)]
    saved = f"saved as step {there[-1]}" if there else "not saved"
    error.add_note(f"the last finite state is {saved}")
    if older := [step for path in before if (step := checkpoint_files.path_step(path)) < there[-1]]:
        error.add_note(f"before it there is step {older[-1]}")


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """On CUDA, operations that have a deterministic form take it; on a CPU all of ours have."""
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
