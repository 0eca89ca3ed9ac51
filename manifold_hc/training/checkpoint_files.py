"""One checkpoint on disk: whole or not there.

One folder a checkpoint, `step-00000500`: the state as torch.distributed.checkpoint writes it, a
file a process, which any other number of processes reads; the weights alone as `model.safetensors`,
where one process has them all; `checkpoint.json`; and `SHA256SUMS` over all of them, which
`sha256sum -c` reads too. It is written under another name and renamed when it is on disk.
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
from typing import Annotated

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
PART_OF_SUMS = "sums"

ONE_PROCESS = "torch.distributed is disabled"
"""What torch warns of where there is one process, as is wanted."""

WRITE_ERRORS = (OSError, SafetensorError, CheckpointException)
"""What a full disk is to Python, safetensors and torch."""

SHOWN = 3
"""Keys that a message names; the rest is counted."""


Count = Annotated[int, msgspec.Meta(ge=0)]


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is of."""

    step: Count
    """Optimizer steps taken."""
    sequences: Count
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


def path_step(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix("step-"))


def read_manifest(path: Path) -> Manifest:
    """What the checkpoint is of; CheckpointError when that cannot be read."""
    try:
        return msgspec.json.decode(read_regular(path / MANIFEST), type=Manifest)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CheckpointError(f"checkpoint: {path / MANIFEST} cannot be read: {error}") from None


def verify(path: Path, processes: Processes | None = None) -> None:
    """Raise CheckpointError unless every file is there, whole and unaltered.

    The processes share the work, and raise together.
    """
    processes = processes or Processes()
    listed = list(processes.on_rank0(lambda: _listed(path)).items())
    processes.each(lambda: _verify_files(path, listed[processes.rank :: processes.size]))


def _listed(path: Path) -> dict[str, str]:
    """Digests by file; CheckpointError where they are not those of all files in the folder."""
    try:
        lines = read_regular(path / SUMS).decode().splitlines()
        listed = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
        there = {file.name for file in path.iterdir()}
    except OSError as error:
        raise CheckpointError(f"checkpoint: {path / SUMS}: {error.strerror}") from None
    except ValueError:
        raise CheckpointError(f"checkpoint: {path / SUMS} is truncated or altered") from None
    if missing := (there | {MANIFEST, INDEX}) - {SUMS} - listed.keys():
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
    metadata = read_metadata(path)
    require_same_model(path, manifest.tensors, state.shapes())
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
        with one_process():
            load_tensors(tensors, storage_reader=Reader(path, metadata), no_dist=alone)
    except CheckpointException as error:
        raise CheckpointError(f"checkpoint: {path} cannot be loaded: {reason_of(error)}") from None
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


class Writer(FileSystemWriter):
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


def _sums(files: list[Path]) -> str:
    return "".join(f"{_sha256(file)}  {file.name}\n" for file in files)


def save_weights(weights: dict[str, Tensor], file: Path) -> None:
    """Weights alone, as safetensors, with the umask's mode; not atomic."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    file.touch()
    mode = stat.S_IMODE(file.stat().st_mode)
    save_file(plain, file, metadata={"format": "pt"})
    file.chmod(mode)  # safetensors makes its files private


@contextmanager
def one_process() -> Iterator[None]:
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
    with open_regular(file) as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def is_interrupt(error: BaseException) -> bool:
    """Whether torch has wrapped a Ctrl-C."""
    return isinstance(error, CheckpointException) and any(
        isinstance(inner, KeyboardInterrupt) for inner, _ in error.failures.values()
    )


def as_os_error(error: BaseException, path: Path) -> OSError:
    """The same as an error of the disk at `path`, with its number where there is one."""
    number = getattr(innermost(error), "errno", None) or errno.EIO
    return OSError(number, reason_of(error), str(path))


def innermost(error: BaseException) -> BaseException:
    """The first cause: torch wraps a disk's error twice."""
    while isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return error


def reason_of(error: BaseException) -> str:
    """What the innermost error says."""
    error = innermost(error)
    if "inline_container" in str(error):
        return "torch could not write a file whole, as on a full disk"
    return getattr(error, "strerror", None) or str(error)
