"""Checkpoints that are whole or not there.

One folder a checkpoint, `step-00000500`: the state as torch.distributed.checkpoint writes it, a
file a process, which any other number of processes reads; the weights alone as `model.safetensors`,
where one process has them all; `checkpoint.json`; and `SHA256SUMS` over all of them, which
`sha256sum -c` reads too. It is written under another name and renamed when it is on disk.
"""

import errno
import hashlib
import logging
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import msgspec
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future as Written

from manifold_hc.errors import CheckpointError
from manifold_hc.parallel import Processes
from manifold_hc.training.config import CheckpointConfig, RunConfig, fixed_differences
from manifold_hc.training.state import TrainState

logger = logging.getLogger("manifold_hc")

MANIFEST = "checkpoint.json"
SUMS = "SHA256SUMS"
WEIGHTS = "model.safetensors"
PART_OF_SUMS = "sums"

RETRY_STEPS = 10
"""Steps until a checkpoint that could not be written is tried again."""

ONE_PROCESS = "torch.distributed is disabled"
"""What torch warns of where there is one process, as is wanted."""

WRITE_ERRORS = (OSError, SafetensorError, CheckpointException)
"""What a full disk is to Python, safetensors and torch."""

SHOWN = 3
"""Keys that a message names; the rest is counted."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is of."""

    step: int
    """Optimizer steps taken."""
    sequences: int
    """Sequences seen: the position in the data."""
    validation_loss: float | None
    """Measured at this step, if it was."""
    best: float | None
    """Lowest validation loss so far."""
    data_sha256: str
    """Digest of the corpus."""
    random: tuple[str, ...]
    """Devices whose random states it holds."""
    tensors: dict[str, tuple[int, ...]]
    """Name and shape of every tensor of the model."""
    config: RunConfig
    """What the run was told to do."""


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
        self._pending: tuple[int, _Writer, Future[Any]] | None = None

    def is_due(self, step: int, *, best: bool) -> bool:
        """Whether to make one now: by the plan, as the `best` so far, or as one has failed."""
        planned = step % self.config.every == 0
        return planned or step >= self._retry_at or (best and self.config.best)

    def save(
        self, state: TrainState, validation_loss: float | None = None, *, wait: bool = False
    ) -> bool:
        """Make the checkpoint of this step, drop those that are not kept; whether it is there.

        With `checkpoint.asynchronous`, and unless told to `wait`, it is written while training goes
        on, and `settle` says how that went. A failure is logged, costs nothing that was saved, and
        makes another attempt due soon.
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
        if not wait and not all(self.processes.gathered(written.done())):
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
        if self.processes.by_first(path.exists):
            return
        tensors = state.tensors()
        manifest = self._manifest(state, tensors, validation_loss)
        alone = self.processes.mesh is None
        weights = tensors["model"] if alone else None
        if weights is not None and not wait:
            # torch copies what it writes itself.
            weights = {name: weight.to("cpu", copy=True) for name, weight in weights.items()}
        writer = _Writer(path, manifest, weights)
        self.processes.by_first(writer.clear)
        if wait:
            with _one_process():
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
        self.processes.by_first(self._prune)

    def _failed(self, step: int, error: OSError) -> None:
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
        paths = self.processes.by_first(self.paths)
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
        for path in self.folder.glob(".*"):
            shutil.rmtree(path, ignore_errors=True)

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
            tensors=shapes(tensors["model"]),
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


def path_step(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix("step-"))


def shapes(weights: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor."""
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def read_manifest(path: Path) -> Manifest:
    """What the checkpoint is of; CheckpointError when that cannot be read."""
    try:
        return msgspec.json.decode((path / MANIFEST).read_bytes(), type=Manifest)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CheckpointError(f"checkpoint: {path / MANIFEST} cannot be read: {error}") from None


def verify(path: Path, processes: Processes | None = None) -> None:
    """Raise CheckpointError unless every file is there, whole and unaltered.

    The processes share the work, and raise together.
    """
    processes = processes or Processes()
    listed = list(processes.by_first(lambda: _listed(path)).items())
    processes.each(lambda: _verify_files(path, listed[processes.rank :: processes.size]))


def _listed(path: Path) -> dict[str, str]:
    """Digests by file; CheckpointError where they are not those of all files in the folder."""
    try:
        lines = (path / SUMS).read_text().splitlines()
        listed = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
        there = {file.name for file in path.iterdir()}
    except OSError as error:
        raise CheckpointError(f"checkpoint: {path / SUMS}: {error.strerror}") from None
    except ValueError:
        raise CheckpointError(f"checkpoint: {path / SUMS} is truncated or altered") from None
    if missing := (there | {MANIFEST, ".metadata"}) - {SUMS} - listed.keys():
        raise CheckpointError(f"checkpoint: {path / SUMS} is cut short: no {min(missing)}")
    return listed


def _verify_files(path: Path, listed: list[tuple[str, str]]) -> None:
    for name, digest in listed:
        try:
            found = _sha256(path / name)
        except OSError as error:
            raise CheckpointError(f"checkpoint: {path / name}: {error.strerror}") from None
        if found != digest:
            raise CheckpointError(f"checkpoint: {path / name} is truncated or altered")


def load(path: Path, state: TrainState) -> Manifest:
    """Put a verified checkpoint into `state`; CheckpointError when it is of another run."""
    manifest = read_manifest(path)
    require_same_model(path, manifest.tensors, shapes(state.model.state_dict()))
    if changed := fixed_differences(manifest.config, state.config):
        raise CheckpointError(f"checkpoint: {path} is of a run with other {', '.join(changed)}")
    if manifest.step != path_step(path):
        raise CheckpointError(f"checkpoint: {path} is really that of step {manifest.step}")
    tensors = state.tensors()
    known = tensors["random"]
    # A device that this state lacks still needs a place to be read to.
    tensors["random"] = {name: known.get(name, known["cpu"].clone()) for name in manifest.random}
    alone = state.processes.mesh is None
    try:
        with _one_process():
            load_tensors(tensors, storage_reader=FileSystemReader(path), no_dist=alone)
    except CheckpointException as error:
        raise CheckpointError(f"checkpoint: {path} cannot be loaded: {_reason(error)}") from None
    state.restore(tensors)
    state.step, state.sequences = manifest.step, manifest.sequences
    state.best = math.inf if manifest.best is None else manifest.best
    return manifest


def require_same_model(
    where: Path, found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]
) -> None:
    """Raise CheckpointError, naming the keys, where the tensors are not those of the model."""
    parts = {
        "missing": [key for key in wanted if key not in found],
        "unknown": [key for key in found if key not in wanted],
        "of another shape": [
            f"{key} {list(found[key])} instead of {list(wanted[key])}"
            for key in wanted
            if key in found and tuple(found[key]) != tuple(wanted[key])
        ],
    }
    if any(parts.values()):
        told = "; ".join(f"{what}: {_some(keys)}" for what, keys in parts.items() if keys)
        raise CheckpointError(f"checkpoint: {where} is of another model; {told}")


def _some(keys: list[str]) -> str:
    rest = len(keys) - SHOWN
    return ", ".join(keys[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")


class _Writer(FileSystemWriter):
    """Writes a checkpoint under another name: every process its file, the first one all others.

    The last thing that the first one does, when everything is on disk, is to give it its name.
    """

    def __init__(self, path: Path, manifest: Manifest, weights: dict[str, Tensor] | None) -> None:
        """weights: all of them, where this process has them."""
        self.final, self.temporary = path, path.with_name(f".{path.name}.tmp")
        super().__init__(self.temporary)
        self.manifest, self.weights = manifest, weights

    def clear(self) -> None:
        """Make room."""
        self.discard()
        self.temporary.mkdir(parents=True)

    def discard(self) -> None:
        """Remove what is half written."""
        shutil.rmtree(self.temporary, ignore_errors=True)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Written[list[WriteResult]]:
        """Write this process's file, and its digest for the first one."""
        written = super().write_data(plan, planner)
        own: str = plan.storage_data.prefix
        files = sorted(self.temporary.glob(f"{own}*.distcp"))
        (self.temporary / f"{own}{PART_OF_SUMS}").write_text(_sums(files))
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """In the first process: all that is not a process's own, and the name."""
        super().finish(metadata, results)
        if self.weights is not None:
            save_weights(self.weights, self.temporary / WEIGHTS)
        content = msgspec.json.format(msgspec.json.encode(asdict(self.manifest)))
        (self.temporary / MANIFEST).write_bytes(content)
        parts = sorted(self.temporary.glob(f"*{PART_OF_SUMS}"))
        sums = "".join(part.read_text() for part in parts)
        wanted = {info.relative_path for info in metadata.storage_data.values()}
        if missing := wanted - {line.split("  ", 1)[1] for line in sums.splitlines()}:
            raise OSError(
                errno.ENOENT,
                f"{min(missing)} of another process is not there: "
                "all must see the run folder, on a file system that they share",
                str(self.temporary),
            )
        for part in parts:
            part.unlink()
        rest = sorted(set(self.temporary.iterdir()) - set(self.temporary.glob("*.distcp")))
        (self.temporary / SUMS).write_text(sums + _sums(rest))
        for file in [*rest, self.temporary / SUMS, self.temporary]:
            _flush(file)
        self.temporary.rename(self.final)
        _flush(self.final.parent)


def _finish(run: Callable[[], object], writer: _Writer, processes: Processes) -> None:
    """Run what writes a checkpoint; OSError, and nothing half written, where that fails."""
    try:
        run()
    except BaseException as error:
        if processes.is_first:
            writer.discard()
        if _is_interrupt(error):
            raise KeyboardInterrupt from None
        if isinstance(error, WRITE_ERRORS):
            raise OSError(errno.EIO, _reason(error), str(writer.final)) from error
        raise


def _sums(files: list[Path]) -> str:
    return "".join(f"{_sha256(file)}  {file.name}\n" for file in files)


def save_weights(weights: dict[str, Tensor], file: Path) -> None:
    """Weights alone, as safetensors; not atomic."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    save_file(plain, file, metadata={"format": "pt"})


@contextmanager
def _one_process() -> Iterator[None]:
    """torch.distributed.checkpoint warns where no process group is; here none is wanted."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=ONE_PROCESS)
        yield


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


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


def _is_interrupt(error: BaseException) -> bool:
    """Whether torch has wrapped a Ctrl-C."""
    return isinstance(error, CheckpointException) and any(
        isinstance(inner, KeyboardInterrupt) for inner, _ in error.failures.values()
    )


def _reason(error: BaseException) -> str:
    """The innermost cause: torch wraps a disk's error twice."""
    if isinstance(error, CheckpointException):
        return next((_reason(inner) for inner, _ in error.failures.values()), str(error))
    if "inline_container" in str(error):
        return "torch could not write a file whole, as on a full disk"
    return getattr(error, "strerror", None) or str(error)
