"""Files of one checkpoint, written atomically.

A checkpoint is a folder such as `step-00000500`: the state as torch.distributed.checkpoint writes
it, one file per rank, readable by any number of ranks; the weights as `model.safetensors`, in runs
of one process; `checkpoint.json`; and `SHA256SUMS` over all of them, for `sha256sum -c` too. It is
written under a temporary name and renamed once it is on disk.
"""

import errno
import hashlib
import math
import os
import shutil
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future as Written

from manifold_hc.errors import CheckpointError
from manifold_hc.files import open_regular, read_regular
from manifold_hc.parallel import Processes
from manifold_hc.training.checkpoint_metadata import INDEX, Reader, read_metadata
from manifold_hc.training.config import RunConfig, fixed_differences
from manifold_hc.training.state import TrainState

MANIFEST = "checkpoint.json"
SUMS = "SHA256SUMS"
WEIGHTS = "model.safetensors"
RANK_SUMS = "sums"

NO_PROCESS_GROUP = "torch.distributed is disabled"
"""Warning of torch in a run of one process, which has no process group."""

WRITE_ERRORS = (OSError, SafetensorError, CheckpointException)
"""Errors that a full disk causes in Python, safetensors and torch."""

SHOWN = 3
"""Number of keys that a message names; the rest is counted."""


Count = Annotated[int, msgspec.Meta(ge=0)]


@dataclass(frozen=True)
class Manifest:
    """Description of a checkpoint: checkpoint.json."""

    step: Count
    """Number of optimizer steps taken."""
    sequences: Count
    """Number of sequences seen: the position in the data."""
    validation_loss: float | None
    """Validation loss of this step, if it was measured."""
    best: float | None
    """Lowest validation loss so far."""
    data_sha256: str
    """Digest of the corpus."""
    random: tuple[str, ...]
    """Devices with a random state in the checkpoint."""
    tensors: dict[str, tuple[int, ...]]
    """Global shape of every weight, by name."""
    config: RunConfig
    """Configuration of the run."""


def path_step(path: Path) -> int:
    """Return the step in a checkpoint's name; raise CheckpointError for another name."""
    step = path.name.removeprefix("step-")
    if not step.isdecimal():
        raise CheckpointError(
            f"checkpoint: {path} is not named step-N; give the run that it comes from"
        )
    return int(step)


def read_manifest(path: Path) -> Manifest:
    """Read the description of a checkpoint; raise CheckpointError if that fails."""
    try:
        return msgspec.json.decode(read_regular(path / MANIFEST), type=Manifest)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CheckpointError(f"checkpoint: {path / MANIFEST} cannot be read: {error}") from None


def verify(path: Path, processes: Processes | None = None) -> None:
    """Raise CheckpointError unless every file is present and has its digest.

    A collective call: ranks divide the files and raise the same error.
    """
    processes = processes or Processes()
    listed = list(processes.on_rank0(lambda: _listed(path)).items())
    processes.on_every_rank(lambda: _verify_files(path, listed[processes.rank :: processes.size]))


def _listed(path: Path) -> dict[str, str]:
    """Read the digests by file; raise CheckpointError if a file of the folder has none."""
    try:
        lines = read_regular(path / SUMS).decode().splitlines()
        listed = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
        present = {file.name for file in path.iterdir()}
    except OSError as error:
        raise CheckpointError(f"checkpoint: {path / SUMS}: {error.strerror}") from None
    except ValueError:
        raise CheckpointError(f"checkpoint: {path / SUMS} is truncated or altered") from None
    if missing := (present | {MANIFEST, INDEX}) - {SUMS} - listed.keys():
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
    """Load a verified checkpoint into `state`; raise CheckpointError if it is of another run."""
    manifest = read_manifest(path)
    require_same_model(path, manifest.tensors, state.shapes())
    if changed := fixed_differences(manifest.config, state.config):
        raise CheckpointError(f"checkpoint: {path} is of a run with other {', '.join(changed)}")
    if manifest.step != path_step(path):
        raise CheckpointError(f"checkpoint: {path} is really that of step {manifest.step}")
    tensors = state.tensors()
    known = tensors["random"]
    # torch reads every entry into a tensor, also the random state of a device that is not used.
    tensors["random"] = {name: known.get(name, known["cpu"].clone()) for name in manifest.random}
    read_tensors(path, tensors, state.processes)
    state.restore(tensors)
    state.step, state.sequences = manifest.step, manifest.sequences
    state.best = math.inf if manifest.best is None else manifest.best
    return manifest


def read_tensors(path: Path, tensors: dict[str, Any], processes: Processes) -> None:
    """Read nested tensors of a checkpoint in place, each rank its shards; a collective call.

    Raises CheckpointError if the index is refused or a tensor is missing or damaged.
    """
    reader, single = Reader(path, read_metadata(path)), processes.mesh is None
    try:
        with ignored_warning():
            load_tensors(tensors, storage_reader=reader, no_dist=single)
    except CheckpointException as error:
        raise CheckpointError(f"checkpoint: {path} cannot be loaded: {reason_of(error)}") from None


def require_same_model(
    where: Path, found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]
) -> None:
    """Raise CheckpointError, with the keys, if names or shapes differ from the model's."""
    differences = {
        "missing": [key for key in wanted if key not in found],
        "unknown": [key for key in found if key not in wanted],
        "of another shape": [
            f"{key} {list(found[key])} instead of {list(wanted[key])}"
            for key in wanted
            if key in found and tuple(found[key]) != tuple(wanted[key])
        ],
    }
    if any(differences.values()):
        told = "; ".join(f"{kind}: {_some(keys)}" for kind, keys in differences.items() if keys)
        raise CheckpointError(f"checkpoint: {where} is of another model; {told}")


def _some(keys: list[str]) -> str:
    rest = len(keys) - SHOWN
    return ", ".join(keys[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")


class Writer(FileSystemWriter):
    """Writes a checkpoint under a temporary name: every rank its file, rank 0 the others.

    When all files are on disk, rank 0 renames the folder.
    """

    def __init__(self, path: Path, manifest: Manifest, weights: dict[str, Tensor] | None) -> None:
        """weights: all weights, if this process holds them unsharded."""
        self.final, self.temporary = path, path.with_name(f".{path.name}.tmp")
        super().__init__(self.temporary)
        self.manifest, self.weights = manifest, weights

    def clear(self) -> None:
        """Remove a partial checkpoint and create the temporary folder."""
        self.discard()
        self.temporary.mkdir(parents=True)

    def discard(self) -> None:
        """Remove the temporary folder."""
        shutil.rmtree(self.temporary, ignore_errors=True)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Written[list[WriteResult]]:
        """Write this rank's file, and its digest for rank 0."""
        written = super().write_data(plan, planner)
        own: str = plan.storage_data.prefix
        files = sorted(self.temporary.glob(f"{own}*.distcp"))
        (self.temporary / f"{own}{RANK_SUMS}").write_text(_sums(files))
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the remaining files and rename the folder; torch calls it on rank 0."""
        super().finish(metadata, results)
        if self.weights is not None:
            save_weights(self.weights, self.temporary / WEIGHTS)
        content = msgspec.json.format(msgspec.json.encode(asdict(self.manifest)))
        (self.temporary / MANIFEST).write_bytes(content)
        rank_sums = sorted(self.temporary.glob(f"*{RANK_SUMS}"))
        sums = "".join(file.read_text() for file in rank_sums)
        wanted = {info.relative_path for info in metadata.storage_data.values()}
        if missing := wanted - {line.split("  ", 1)[1] for line in sums.splitlines()}:
            raise OSError(
                errno.ENOENT,
                f"{min(missing)} of another process is not there: "
                "all must see the run folder, on a file system that they share",
                str(self.temporary),
            )
        for file in rank_sums:
            file.unlink()
        # Everything is flushed before the rename: a checkpoint with its name is complete.
        rest = sorted(set(self.temporary.iterdir()) - set(self.temporary.glob("*.distcp")))
        (self.temporary / SUMS).write_text(sums + _sums(rest))
        for file in [*rest, self.temporary / SUMS, self.temporary]:
            _flush(file)
        self.temporary.rename(self.final)
        _flush(self.final.parent)


def _sums(files: list[Path]) -> str:
    return "".join(f"{_sha256(file)}  {file.name}\n" for file in files)


def save_weights(weights: dict[str, Tensor], file: Path) -> None:
    """Write weights as safetensors, with the umask's mode; not atomic."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    file.touch()
    mode = stat.S_IMODE(file.stat().st_mode)
    save_file(plain, file, metadata={"format": "pt"})
    file.chmod(mode)  # safetensors creates private files


@contextmanager
def ignored_warning() -> Iterator[None]:
    """Silence the warning of torch.distributed.checkpoint about a missing process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=NO_PROCESS_GROUP)
        yield


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(file: Path) -> str:
    with open_regular(file) as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def is_interrupt(error: BaseException) -> bool:
    """Return True if torch has wrapped a KeyboardInterrupt."""
    return isinstance(error, CheckpointException) and any(
        isinstance(inner, KeyboardInterrupt) for inner, _ in error.failures.values()
    )


def as_os_error(error: BaseException, path: Path) -> OSError:
    """Convert an error of a write to an OSError at `path`, with its errno if it has one."""
    number = getattr(innermost(error), "errno", None) or errno.EIO
    return OSError(number, reason_of(error), str(path))


def innermost(error: BaseException) -> BaseException:
    """Return the first cause: torch wraps an error of the disk twice."""
    while isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return error


def reason_of(error: BaseException) -> str:
    """Return the message of the innermost error."""
    error = innermost(error)
    if "inline_container" in str(error):
        return "torch could not write a file whole, as on a full disk"
    return getattr(error, "strerror", None) or str(error)
