"""Checkpoints that are whole or not there.

One folder a checkpoint, `step-00000500`: the state as torch.distributed.checkpoint writes it, the
weights alone as `model.safetensors`, `checkpoint.json`, and `SHA256SUMS` over all of them, which
`sha256sum -c` reads too. It is written under another name and renamed when it is on disk.
"""

import errno
import hashlib
import logging
import math
import os
import shlex
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from manifold_hc.errors import CheckpointError
from manifold_hc.training.config import CheckpointConfig, RunConfig, fixed_differences
from manifold_hc.training.state import TrainState

logger = logging.getLogger("manifold_hc")

MANIFEST = "checkpoint.json"
SUMS = "SHA256SUMS"
WEIGHTS = "model.safetensors"

RETRY_STEPS = 10
"""Steps until a checkpoint that could not be written is tried again."""

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
    """The checkpoints of one run."""

    def __init__(self, folder: Path, config: CheckpointConfig, data_sha256: str) -> None:
        """folder: where they lie, or will; nothing is made or read."""
        self.folder = folder
        self.config = config
        self.data_sha256 = data_sha256
        self._retry_at = math.inf

    def is_due(self, step: int, *, best: bool) -> bool:
        """Whether to make one now: by the plan, as the `best` so far, or as one has failed."""
        planned = step % self.config.every == 0
        return planned or step >= self._retry_at or (best and self.config.best)

    def save(self, state: TrainState, validation_loss: float | None = None) -> bool:
        """Make the checkpoint of this step, drop those that are not kept; whether it is there.

        A failure is logged, costs nothing that was saved, and makes another attempt due soon.
        """
        try:
            self.write(state, validation_loss)
        except OSError as error:
            if not state.step < self._retry_at < math.inf:
                self._retry_at = state.step + RETRY_STEPS
            logger.error(
                "CHECKPOINT NOT SAVED at step %d: %s; a run that goes on tries again at step %d; "
                "free some space at %s",
                state.step,
                error.strerror,
                self._retry_at,
                self.folder,
            )
            return False
        self._retry_at = math.inf
        self._prune()
        return True

    def write(self, state: TrainState, validation_loss: float | None = None) -> None:
        """Make the checkpoint of this step, if it is not there, and drop none.

        Raises OSError, whoever noticed that the disk did not take it.
        """
        path = self.folder / f"step-{state.step:08}"
        if path.exists():
            return
        try:
            self._write(path, state, validation_loss)
        except WRITE_ERRORS as error:
            if _is_interrupt(error):
                raise KeyboardInterrupt from None
            raise OSError(errno.EIO, _reason(error), str(path)) from error

    def paths(self) -> list[Path]:
        """Those that are there, oldest first; whole or not."""
        return sorted(path for path in self.folder.glob("step-*") if path.name[5:].isdigit())

    def find(self, step: int | None = None) -> Path | None:
        """The newest, or that of `step`, with its checksums verified; None where there is none.

        Raises CheckpointError for a damaged one, and names the newest whole one before it.
        """
        paths = self.paths()
        if step is not None:
            paths = [path for path in paths if path_step(path) == step]
            if not paths:
                there = ", ".join(str(path_step(path)) for path in self.paths()) or "none"
                raise CheckpointError(
                    f"checkpoint: {self.folder} has none of step {step}; there are: {there}"
                )
        if not paths:
            return None
        try:
            verify(paths[-1])
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {self._offer(path_step(paths[-1]))}") from None
        return paths[-1]

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

    def _write(self, path: Path, state: TrainState, validation_loss: float | None) -> None:
        tensors = state.tensors()
        manifest = Manifest(
            step=state.step,
            sequences=state.sequences,
            validation_loss=validation_loss,
            best=state.best if math.isfinite(state.best) else None,
            data_sha256=self.data_sha256,
            random=tuple(tensors["random"]),
            tensors=shapes(tensors["model"]),
            config=state.config,
        )
        _write(path, tensors, manifest)

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

    def _offer(self, before: int) -> str:
        run = shlex.quote(str(self.folder.parent))
        for path in reversed(self.paths()):
            if path_step(path) < before:
                try:
                    verify(path)
                except CheckpointError:
                    continue
                return (
                    f"the one before it is whole: mhc train --resume {run} --step {path_step(path)}"
                )
        return "there is no whole one before it"


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


def verify(path: Path) -> None:
    """Raise CheckpointError unless every file is there, whole and unaltered."""
    try:
        lines = (path / SUMS).read_text().splitlines()
        listed = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except OSError as error:
        raise CheckpointError(f"checkpoint: {path / SUMS}: {error.strerror}") from None
    except ValueError:
        raise CheckpointError(f"checkpoint: {path / SUMS} is truncated or altered") from None
    if missing := {MANIFEST, WEIGHTS, ".metadata"} - listed.keys():
        raise CheckpointError(f"checkpoint: {path / SUMS} is cut short: no {min(missing)}")
    for name, digest in listed.items():
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
    try:
        with _one_process():
            load_tensors(tensors, storage_reader=FileSystemReader(path), no_dist=True)
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


def _write(path: Path, tensors: dict[str, Any], manifest: Manifest) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with _one_process():
            save_tensors(tensors, storage_writer=FileSystemWriter(temporary), no_dist=True)
        save_weights(tensors["model"], temporary / WEIGHTS)
        content = msgspec.json.format(msgspec.json.encode(asdict(manifest)))
        (temporary / MANIFEST).write_bytes(content)
        names = sorted(file.name for file in temporary.iterdir())
        sums = "".join(f"{_sha256(temporary / name)}  {name}\n" for name in names)
        (temporary / SUMS).write_text(sums)
        for file in [*temporary.iterdir(), temporary]:
            _flush(file)
        temporary.rename(path)
        _flush(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def save_weights(weights: dict[str, Tensor], file: Path) -> None:
    """Weights alone, as safetensors; not atomic."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    save_file(plain, file, metadata={"format": "pt"})


@contextmanager
def _one_process() -> Iterator[None]:
    """torch.distributed.checkpoint warns where no process group is; here none is wanted."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
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
