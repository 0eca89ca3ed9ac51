"""Which checkpoints a run makes, keeps and goes on from."""

import logging
import math
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from manifold_hc.errors import CheckpointError, ManifoldError, RunFolderError
from manifold_hc.files import is_permanent
from manifold_hc.parallel import Processes
from manifold_hc.training.checkpoint_files import (
    ONE_PROCESS,
    WRITE_ERRORS,
    Manifest,
    Writer,
    as_os_error,
    is_interrupt,
    one_process,
    path_step,
    read_manifest,
    verify,
)
from manifold_hc.training.config import CheckpointConfig
from manifold_hc.training.state import TrainState

logger = logging.getLogger("manifold_hc")

RETRY_STEPS = 10
"""Steps until a checkpoint that could not be written is tried again."""


class Checkpoints:
    """The checkpoints of one run; all of its processes save and find together."""

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        data_sha256: str,
        processes: Processes | None = None,
    ) -> None:
        """folder: where they lie, or will; nothing is made or read."""
        self.folder = folder
        self.config = config
        self.data_sha256 = data_sha256
        self.processes = processes or Processes()
        self._retry_at = math.inf
        self._pending: tuple[int, Writer, Future[Any]] | None = None

    def is_due(self, step: int, *, best: bool) -> bool:
        """Whether to make one now: by the plan, as the `best` so far, or as one has failed."""
        planned = step % self.config.every == 0
        return planned or step >= self._retry_at or (best and self.config.best)

    def save(
        self, state: TrainState, validation_loss: float | None = None, *, wait: bool = False
    ) -> bool:
        """Make the checkpoint of this step, drop those that are not kept; whether it is there.

        With `checkpoint.asynchronous`, and unless told to `wait`, it is written while training goes
        on, and `settle` says how that went. A full disk is logged, costs nothing that was saved,
        and makes another attempt due soon. Raises ManifoldError where no attempt can help: the
        folder cannot be written.
        """
        self.settle(wait=True)
        try:
            self._start(state, validation_loss, wait=wait or not self.config.asynchronous)
        except OSError as error:
            self._failed(state.step, error)
            return False
        if self._pending is None:
            self._made()
        return True

    def write(self, state: TrainState) -> None:
        """Make the checkpoint of this step, if it is not there, and drop none.

        Raises OSError, whoever noticed that the disk did not take it.
        """
        self.settle(wait=True)
        self._start(state, None, wait=True)

    def settle(self, *, wait: bool = False) -> None:
        """Take note of a checkpoint that was written in the meantime, or `wait` until it is."""
        if self._pending is None:
            return
        step, writer, written = self._pending
        if not wait and not all(self.processes.all_gather(written.done())):
            return
        self._pending = None
        try:
            _finish(written.result, writer, self.processes)
        except OSError as error:
            self._failed(step, error)
        else:
            self._made()

    def _start(self, state: TrainState, validation_loss: float | None, *, wait: bool) -> None:
        path = self.folder / f"step-{state.step:08}"
        self.processes.at(f"step {state.step}, checkpoint")
        if self.processes.on_rank0(path.exists):
            return
        tensors = state.tensors()
        manifest = self._manifest(state, tensors, validation_loss)
        alone = self.processes.mesh is None
        weights = tensors["model"] if alone else None
        if weights is not None and not wait:
            # torch copies what it writes itself.
            weights = {name: weight.to("cpu", copy=True) for name, weight in weights.items()}
        writer = Writer(path, manifest, weights)
        self.processes.on_rank0(writer.clear)
        if wait:
            with one_process():
                save = partial(save_tensors, tensors, storage_writer=writer, no_dist=alone)
                _finish(save, writer, self.processes)
            return
        # It is said in another thread, at any time from now on.
        warnings.filterwarnings("ignore", message=ONE_PROCESS)
        written = async_save(
            tensors,
            storage_writer=writer,
            process_group=self.processes.background,
            no_dist=alone,
        )
        self._pending = (state.step, writer, cast(Future[Any], written))

    def _made(self) -> None:
        self._retry_at = math.inf
        self.processes.on_rank0(self._prune)

    def _failed(self, step: int, error: OSError) -> None:
        if is_permanent(error):
            raise ManifoldError(
                f"checkpoint: {self.folder} cannot be written ({error.strerror}), and step {step} "
                "is not saved; mend that and go on with --resume"
            )
        if not step < self._retry_at < math.inf:
            self._retry_at = step + RETRY_STEPS
        if self.processes.is_first:
            logger.error(
                "CHECKPOINT NOT SAVED at step %d: %s; a run that goes on tries again at step %d; "
                "free some space at %s",
                step,
                error.strerror,
                self._retry_at,
                self.folder,
            )

    def paths(self) -> list[Path]:
        """Those that are there, oldest first; whole or not."""
        return sorted(path for path in self.folder.glob("step-*") if path.name[5:].isdigit())

    def find(self, step: int | None = None) -> Path | None:
        """The newest whole one, or that of `step`; None where there is none.

        A damaged one is passed over, loudly, for the one before it. Raises CheckpointError where
        that of `step` is damaged, or all are.
        """
        paths = self.processes.on_rank0(self.paths)
        if step is not None:
            chosen = [path for path in paths if path_step(path) == step]
            if not chosen:
                there = ", ".join(str(path_step(path)) for path in paths) or "none"
                raise CheckpointError(
                    f"checkpoint: {self.folder} has none of step {step}; there are: {there}"
                )
            verify(chosen[0], self.processes)
            return chosen[0]
        for path in reversed(paths):
            try:
                verify(path, self.processes)
            except CheckpointError as error:
                if self.processes.is_first:
                    logger.error("CHECKPOINT DAMAGED AND PASSED OVER: %s", error)
                continue
            return path
        if paths:
            raise CheckpointError(
                f"checkpoint: every one in {self.folder} is damaged; start the run again elsewhere"
            )
        return None

    def abandon_after(self, step: int) -> None:
        """Set aside the checkpoints of a future that a run started again before them leaves."""
        for path in self.paths():
            if path_step(path) > step:
                aside = _unused(path.with_name(f"{path.name}.abandoned"))
                path.rename(aside)
                logger.warning("checkpoint: %s is set aside as %s", path, aside.name)

    def clean(self) -> None:
        """Remove what a killed process left half written."""
        for path in self.folder.glob(".step-*"):
            shutil.rmtree(path, ignore_errors=True)

    def require_writable(self) -> None:
        """Raise RunFolderError where no checkpoint could be written; leaves an empty folder."""
        probe = self.folder / f".step-probe-{self.processes.rank}.tmp"
        try:
            probe.mkdir(parents=True, exist_ok=True)
            (probe / "file").write_bytes(b"written")
            shutil.rmtree(probe)
        except OSError as error:
            raise RunFolderError(
                f"checkpoint: {self.folder} cannot be written ({error.strerror}), so that the run "
                "could not be saved; mend that, or choose another place with --out"
            ) from None

    def _manifest(
        self, state: TrainState, tensors: dict[str, Any], validation_loss: float | None
    ) -> Manifest:
        return Manifest(
            step=state.step,
            sequences=state.sequences,
            validation_loss=validation_loss,
            best=state.best if math.isfinite(state.best) else None,
            data_sha256=self.data_sha256,
            random=tuple(tensors["random"]),
            tensors=state.shapes(),
            config=state.config,
        )

    def _prune(self) -> None:
        paths = self.paths()
        kept = set(paths[-self.config.keep :])
        losses = {path: loss for path in paths if (loss := _validation_loss(path)) is not None}
        if self.config.best and losses:
            kept.add(min(losses, key=lambda path: (losses[path], path)))
        for path in paths:
            if path not in kept:
                # Renamed first, so that what is left of it is never taken for a checkpoint.
                doomed = path.with_name(f".{path.name}")
                try:
                    path.rename(doomed)
                except OSError as error:
                    logger.warning("checkpoint: %s stays: %s", path, error.strerror)
                shutil.rmtree(doomed, ignore_errors=True)


def _finish(run: Callable[[], object], writer: Writer, processes: Processes) -> None:
    """Run what writes a checkpoint; OSError, and nothing half written, where that fails."""
    try:
        run()
    except BaseException as error:
        if processes.is_first:
            writer.discard()
        if is_interrupt(error):
            raise KeyboardInterrupt from None
        if isinstance(error, WRITE_ERRORS):
            raise as_os_error(error, writer.final) from error
        raise


def _validation_loss(path: Path) -> float | None:
    try:
        return read_manifest(path).validation_loss
    except CheckpointError:
        return None


def _unused(path: Path) -> Path:
    number = 1
    found = path
    while found.exists():
        number += 1
        found = path.with_name(f"{path.name}-{number}")
    return found
