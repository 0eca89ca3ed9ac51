"""A run folder: the one place that knows where a run keeps what.

config.json        the configuration
metrics.jsonl      one record a line: {"event": "step" | "validation" | ..., "step": ...}
model.safetensors  the final weights
summary.json       the run's figures; its presence means that the run is complete
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import msgspec
from safetensors.torch import save
from torch import Tensor

from manifold_hc.errors import RunFolderError
from manifold_hc.files import write_atomically
from manifold_hc.training.config import RunConfig


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the folder for this process; RunFolderError when another one does."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path / ".lock", timeout=0)
        with lock:
            yield
    except filelock.Timeout:
        raise RunFolderError(
            f"run folder: {path} is in use by another process; choose another with --out"
        ) from None
    except (FileExistsError, NotADirectoryError):
        raise RunFolderError(
            f"run folder: {path} is a file; choose another place with --out"
        ) from None


class RunFolder:
    """What a run has written, and where the next thing goes."""

    def __init__(self, path: Path) -> None:
        """Nothing is created or read."""
        self.path = path
        self.config_file = path / "config.json"
        self.metrics_file = path / "metrics.jsonl"
        self.model_file = path / "model.safetensors"
        self.summary_file = path / "summary.json"

    def is_empty(self) -> bool:
        """Whether there is nothing in the folder but its lock."""
        return not self.path.exists() or all(p.name == ".lock" for p in self.path.iterdir())

    def is_complete(self) -> bool:
        """Whether the run reached its end."""
        return self.summary_file.exists()

    def config(self) -> RunConfig:
        """The run's configuration; RunFolderError when it is not there or cannot be read."""
        try:
            return msgspec.json.decode(self.config_file.read_bytes(), type=RunConfig)
        except FileNotFoundError:
            raise RunFolderError(f"run folder: {self.path} has no config.json") from None
        except msgspec.MsgspecError as error:
            raise RunFolderError(f"run folder: {self.config_file} is not valid: {error}") from None

    def begin(self, config: RunConfig) -> None:
        """Start afresh: the metrics of an unfinished run before it are dropped."""
        self.metrics_file.unlink(missing_ok=True)
        write_atomically(self.config_file, msgspec.json.format(msgspec.json.encode(config)))

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line to the metrics, null for a number that is not finite."""
        with self.metrics_file.open("ab") as file:
            file.write(msgspec.json.encode(record) + b"\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All records so far; a last line cut short by a crash is left out."""
        if not self.metrics_file.exists():
            return []
        lines = self.metrics_file.read_bytes().split(b"\n")[:-1]
        return [msgspec.json.decode(line) for line in lines]

    def save_model(self, weights: Mapping[str, Tensor]) -> None:
        """Write the weights as safetensors."""
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        write_atomically(self.model_file, save(plain, metadata={"format": "pt"}))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the summary, which marks the run as complete."""
        write_atomically(self.summary_file, msgspec.json.format(msgspec.json.encode(summary)))

    def summary(self) -> dict[str, Any]:
        """The figures of a complete run."""
        summary: dict[str, Any] = msgspec.json.decode(self.summary_file.read_bytes())
        return summary
