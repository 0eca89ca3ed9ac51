"""Checkpoints of a run: when they are saved, which are kept, and which one to resume from."""

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
    NO_PROCESS_GROUP,
    WRITE_ERRORS,
    Manifest,
    Writer,
    as_os_error,
    ignored_warning,
    is_interrupt,
    path_step,
    read_manifest,
    verify,
)
from manifold_hc.training.config import CheckpointConfig
from manifold_hc.training.state import TrainState

logger = logging.getLogger("manifold_hc")

RETRY_STEPS = 10
"""Steps until a failed save is retried."""


class Checkpoints:
    """Checkpoints of one run; `save`, `write`, `finish_pending` and `find` are collective calls."""

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        data_sha256: str,
        processes: Processes | None = None,
    ) -> None:
        """folder: of the checkpoints; nothing is created or read yet."""
        self.folder = folder
        self.config = config
        self.data_sha256 = data_sha256
        self.processes = processes or Processes()
        self._retry_at = math.inf
        self._pending: tuple[int, Writer, Future[Any]] | None = None

    def is_due(self, step: int, *, best: bool) -> bool:
        """Return True if a save is due: by interval, as the `best` so far, or after a failure."""
        planned = step % self.config.every == 0
        return planned or step >= self._retry_at or (best and self.config.best)

    def save(
        self, state: TrainState, validation_loss: float | None = None, *, wait: bool = False
    ) -> bool:
        """Save a checkpoint of this step and delete superseded ones; return False on a full disk.

        With `checkpoint.asynchronous`, and without `wait`, the checkpoint is written in the
        background; `finish_pending` handles its outcome. A full disk is logged, keeps all earlier
        checkpoints, and makes a retry due soon. Raises ManifoldError if the folder cannot be
        written at all.
        """
        self.finish_pending(wait=True)
        try:
            self._start(state, validation_loss, wait=wait or not self.config.asynchronous)
        except OSError as error:
            self._handle_failure(state.step, error)
            return False
        if self._pending is None:
            self._handle_success()
        return True

    def write(self, state: TrainState) -> None:
        """Save a checkpoint of this step, if there is none, and delete no other.

        Raises OSError on all ranks if any rank cannot write.
        """
        self.finish_pending(wait=True)
        self._start(state, None, wait=True)

    def finish_pending(self, *, wait: bool = False) -> None:
        """Handle the outcome of a background save if it has ended; with `wait`, block for it."""
        if self._pending is None:
            return
        step, writer, written = self._pending
        # All ranks must agree that it has ended: the rest is collective.
        if not wait and not all(self.processes.all_gather(written.done())):
            return
        self._pending = None
        try:
            _finish(written.result, writer, self.processes)
        except OSError as error:
            self._handle_failure(step, error)
        else:
            self._handle_success()

    def _start(self, state: TrainState, validation_loss: float | None, *, wait: bool) -> None:
        """Write the checkpoint, or start writing it in the background."""
        path = self.folder / f"step-{state.step:08}"
        with self.processes.phase("checkpoint"):
            if self.processes.on_rank0(path.exists):
                return
            tensors = state.tensors()
            manifest = self._manifest(state, tensors, validation_loss)
            single = self.processes.mesh is None
            weights = tensors["model"] if single else None
            if weights is not None and not wait:
                # torch copies the tensors that it writes itself; these go into model.safetensors.
                weights = {name: weight.to("cpu", copy=True) for name, weight in weights.items()}
            writer = Writer(path, manifest, weights)
            self.processes.on_rank0(writer.clear)
            if wait:
                with ignored_warning():
                    save = partial(save_tensors, tensors, storage_writer=writer, no_dist=single)
                    _finish(save, writer, self.processes)
                return
            # The background thread may warn at any time from now on.
            warnings.filterwarnings("ignore", message=NO_PROCESS_GROUP)
            # Collectives of that thread need a process group of their own: in the main one they
            # would interleave with those of training, in another order on every rank.
            written = async_save(
                tensors,
                storage_writer=writer,
                process_group=self.processes.background_group,
                no_dist=single,
            )
            self._pending = (state.step, writer, cast(Future[Any], written))

    def _handle_success(self) -> None:
        self._retry_at = math.inf
        self.processes.on_rank0(self._prune)

    def _handle_failure(self, step: int, error: OSError) -> None:
        if is_permanent(error):
            raise ManifoldError(
                f"checkpoint: {self.folder} cannot be written ({error.strerror}), and step {step} "
                "is not saved; mend that and go on with --resume"
            )
        if not step < self._retry_at < math.inf:
            self._retry_at = step + RETRY_STEPS
        if self.processes.is_rank0:
            logger.error(
                "CHECKPOINT NOT SAVED at step %d: %s; a run that goes on tries again at step %d; "
                "free some space at %s",
                step,
                error.strerror,
                self._retry_at,
                self.folder,
            )

    def paths(self) -> list[Path]:
        """Return the checkpoints on disk, oldest first, intact or damaged."""
        return sorted(path for path in self.folder.glob("step-*") if path.name[5:].isdigit())

    def find(self, step: int | None = None) -> Path | None:
        """Return the newest intact checkpoint, or that of `step`; None if there is none.

        Damaged checkpoints are skipped with an error in the log. Raises CheckpointError if the one
        of `step` is missing or damaged, or all are damaged.
        """
        paths = self.processes.on_rank0(self.paths)
        if step is not None:
            chosen = [path for path in paths if path_step(path) == step]
            if not chosen:
                known = ", ".join(str(path_step(path)) for path in paths) or "none"
                raise CheckpointError(
                    f"checkpoint: {self.folder} has none of step {step}; there are: {known}"
                )
            verify(chosen[0], self.processes)
            return chosen[0]
        for path in reversed(paths):
            try:
                verify(path, self.processes)
            except CheckpointError as error:
                if self.processes.is_rank0:
                    logger.error("CHECKPOINT DAMAGED AND PASSED OVER: %s", error)
                continue
            return path
        if paths:
            raise CheckpointError(
                f"checkpoint: every one in {self.folder} is damaged; start the run again elsewhere"
            )
        return None

    def abandon_after(self, step: int) -> None:
        """Rename the checkpoints of later steps, which a run resumed at `step` abandons."""
        for path in self.paths():
            if path_step(path) > step:
                aside = _unused(path.with_name(f"{path.name}.abandoned"))
                path.rename(aside)
                logger.warning("checkpoint: %s is set aside as %s", path, aside.name)

    def clean(self) -> None:
        """Remove partial checkpoints of a killed process."""
        for path in self.folder.glob(".step-*"):
            shutil.rmtree(path, ignore_errors=True)

    def require_writable(self) -> None:
        """Raise RunFolderError if the folder cannot be written; create it otherwise."""
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
                # Renamed first: a partial deletion must not look like a checkpoint.
                doomed = path.with_name(f".{path.name}")
                try:
                    path.rename(doomed)
                except OSError as error:
                    logger.warning("checkpoint: %s stays: %s", path, error.strerror)
                shutil.rmtree(doomed, ignore_errors=True)


def _finish(run: Callable[[], object], writer: Writer, processes: Processes) -> None:
    """Run the write of a checkpoint; raise OSError and remove the partial one if it fails."""
    try:
        run()
    except BaseException as error:
        if processes.is_rank0:
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
    """Return `path`, or the first of path-2, path-3, ... that does not exist."""
    number = 1
    found = path
    while found.exists():
        number += 1
        found = path.with_name(f"{path.name}-{number}")
    return found
