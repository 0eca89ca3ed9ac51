"""Weights on disk that a run can start from: a checkpoint, or safetensors files."""

import hashlib
import shlex
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

from torch import Tensor

from manifold_hc.config import ConnectionConfig
from manifold_hc.data import DataConfig
from manifold_hc.data.tokenizer import Tokenizer
from manifold_hc.errors import CheckpointError
from manifold_hc.files import read_regular
from manifold_hc.models import DecoderConfig
from manifold_hc.parallel import Processes
from manifold_hc.training.checkpoint_files import (
    SUMS,
    Manifest,
    path_step,
    read_manifest,
    read_tensors,
    verify,
)
from manifold_hc.training.config import RunConfig
from manifold_hc.training.weight_files import WeightFiles

CHECKPOINTS = "checkpoints"
"""Name of the folder of checkpoints in a run."""


@dataclass(frozen=True)
class WeightSource(ABC):
    """Weights on disk, with the sizes of their model."""

    path: Path
    """Folder of the checkpoint, the run or the export."""
    model: DecoderConfig
    """Sizes of the decoder."""
    connection: ConnectionConfig
    """Connections of the decoder."""
    tokenizer: Tokenizer | None
    """Tokenizer of the text that made the weights; None if it is not known."""
    data: DataConfig
    """The keys of `data` that choose this tokenizer."""
    unreadable: str = field(default="", kw_only=True)
    """Reason why the tokenizer of a run cannot be read; empty if there is none."""

    @property
    def step(self) -> int | None:
        """Number of optimizer steps that made the weights; None if it is not known."""
        return None

    def config(self) -> RunConfig:
        """Return the default configuration of a run with this model and tokenizer."""
        return RunConfig(model=self.model, connection=self.connection, data=self.data)

    @property
    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, by its name in the decoder's state_dict."""

    @abstractmethod
    def verify(self, processes: Processes) -> None:
        """Raise CheckpointError if a file is damaged; a collective call."""

    @abstractmethod
    def read(self, tensors: Mapping[str, Tensor], processes: Processes) -> None:
        """Read tensors in place, each rank its shards; a collective call."""

    @abstractmethod
    def sha256(self) -> str:
        """Return a digest that identifies the files."""


@dataclass(frozen=True)
class CheckpointSource(WeightSource):
    """Weights of one checkpoint of a run."""

    @property
    def step(self) -> int:
        """Number of optimizer steps of the checkpoint."""
        return self.manifest.step

    @cached_property
    def manifest(self) -> Manifest:
        """Description of the checkpoint; a copy of the folder may have any name."""
        return read_manifest(self.path)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, by name."""
        return self.manifest.tensors

    def verify(self, processes: Processes) -> None:
        """Check the digests of all files; the ranks divide them."""
        try:
            verify(self.path, processes)
        except CheckpointError as error:
            raise processes.on_rank0(partial(with_older, error, self.path)) from None

    def read(self, tensors: Mapping[str, Tensor], processes: Processes) -> None:
        """Read tensors in place; the layout of the ranks may differ from that of the checkpoint."""
        read_tensors(self.path, {"model": dict(tensors)}, processes)

    def sha256(self) -> str:
        """Return the SHA-256 of the file SHA256SUMS."""
        return hashlib.sha256(read_regular(self.path / SUMS)).hexdigest()


def with_older(error: CheckpointError, path: Path) -> CheckpointError:
    """Return the error of a damaged checkpoint, with the newest intact one of the run before it."""
    if path.parent.name != CHECKPOINTS:
        return error
    for older in sorted(path.parent.glob("step-*"), reverse=True):
        if older.name >= path.name or not older.name[5:].isdecimal():
            continue
        try:
            verify(older)
        except CheckpointError:
            continue
        run = shlex.quote(str(path.parent.parent))
        step = path_step(older)
        return CheckpointError(f"{error}; step {step} is intact: --init {run} --step {step}")
    return error


@dataclass(frozen=True)
class FileSource(WeightSource):
    """Weights in model.safetensors: of an export, or of a run without checkpoints."""

    prefix: str = ""
    """Prefix of the tensors' names in the files."""

    @cached_property
    def files(self) -> WeightFiles:
        """The safetensors files of the folder."""
        return WeightFiles(self.path, self.prefix)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, by name."""
        return self.files.shapes()

    def verify(self, processes: Processes) -> None:
        """Read the header of every file, which safetensors compares with the file's length."""
        processes.on_rank0(self.files.shapes)

    def read(self, tensors: Mapping[str, Tensor], processes: Processes) -> None:
        """Read tensors in place; every rank maps the files and copies its shards."""
        processes.on_every_rank(lambda: self.files.read(tensors))

    def sha256(self) -> str:
        """Return the SHA-256 of the file, or of the list of digests of several files."""
        return self.files.sha256()
