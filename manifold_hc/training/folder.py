"""Run folder: the files of one run.

config.json        configuration
metrics.jsonl      one record per line: {"event": "step" | "validation" | ..., "step": ...}
checkpoints/       one folder per checkpoint
model.safetensors  final weights
summary.json       final figures; it marks the run as complete
"""

import logging
import os
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import filelock
import msgspec
from safetensors.torch import save
from torch import Tensor

from manifold_hc.errors import RunFolderError
from manifold_hc.files import read_regular, remove_temporaries, write_atomically
from manifold_hc.training.config import RunConfig
from manifold_hc.training.json_files import damaged_error, is_number, read_json, unreadable_error
from manifold_hc.training.metrics_file import MetricsFile

logger = logging.getLogger("manifold_hc")

LOOKS, PAUSE = 20, 0.5
"""Attempts, and seconds between two, to see a file that rank 0 has written."""

SUMMARY = {
    "validation_loss",
    "seconds_per_step",
    "largest_gradient_norm",
    "parameters",
    "steps",
}
"""Required numbers in the summary of a run that reached its last step."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a run folder; raise RunFolderError if it is in use or not writable."""
    lock = filelock.FileLock(path / ".lock", timeout=0)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        raise RunFolderError(
            f"run folder: {path} is in use by another process; "
            "end that one, or choose another with --out"
        ) from None
    except OSError as error:
        raise RunFolderError(
            f"run folder: {path} cannot be made or written ({error.strerror}); "
            "choose another place with --out"
        ) from None
    try:
        yield
    finally:
        lock.release()


def refuse_if_in_use(path: Path) -> None:
    """Raise RunFolderError if another process holds the folder; create no lock file."""
    if (path / ".lock").exists():
        with locked(path):
            pass


def is_empty(path: Path) -> bool:
    """Return True if a folder is missing or holds only hidden files, such as the lock."""
    return not path.is_dir() or all(found.name.startswith(".") for found in path.iterdir())


def resume_command(path: Path, config: RunConfig) -> str:
    """Return the command that resumes the run in a folder."""
    size = config.parallel.size
    command = f"torchrun --nproc-per-node {size} -m manifold_hc" if size > 1 else "mhc"
    return f"{command} train --resume {shlex.quote(str(path))}"


class RunFolder:
    """Files of one run."""

    def __init__(self, path: Path) -> None:
        """path: of the folder; nothing is created or read yet."""
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.config_file = path / "config.json"
        self.metrics_file = path / "metrics.jsonl"
        self.records = MetricsFile(self.metrics_file)
        self.model_file = path / "model.safetensors"
        self.summary_file = path / "summary.json"
        self._job_file = path / ".job"

    def set_job(self, job: str) -> None:
        """Write the identity of the torchrun job that trains here."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self._job_file, job)

    def has_job(self, job: str | None) -> bool:
        """Return True if the torchrun job `job` trains here."""
        try:
            known = read_regular(self._job_file) if self._job_file.exists() else None
        except OSError as error:
            raise unreadable_error(self._job_file, error) from None
        return known is not None and job is not None and known == job.encode()

    def require_shared(self, config: RunConfig) -> None:
        """Raise RunFolderError if this process does not see the configuration of rank 0."""
        for _ in range(LOOKS):
            if self.config_file.exists() and self.config() == config:
                return
            time.sleep(PAUSE)
        raise RunFolderError(
            f"run folder: process {os.environ.get('RANK')} does not see {self.path} as the first "
            "one does; --out must be on a file system that all processes share"
        )

    def is_new(self) -> bool:
        """Return True if a run may start here.

        The folder may hold hidden files, and the remains of a run killed before its configuration
        was written.
        """
        if not self.path.is_dir():
            return True
        shown = {found for found in self.path.iterdir() if not found.name.startswith(".")}
        remains = {self.checkpoints} if is_empty(self.checkpoints) else set()
        if self.metrics_file in shown and not self.metrics_file.stat().st_size:
            remains.add(self.metrics_file)
        return shown <= remains

    def clean(self) -> None:
        """Remove temporary files of a killed run; only the process with the lock may call it."""
        files = (self.config_file, self.metrics_file, self.model_file, self.summary_file)
        remove_temporaries(*files, self._job_file)

    def is_complete(self) -> bool:
        """Return True if the run has a summary: it reached its end."""
        return self.summary_file.exists()

    def config(self) -> RunConfig:
        """Return the configuration; raise RunFolderError if it is damaged or of another version."""
        if not self.config_file.exists():
            where = "" if self.is_new() else " in another folder"
            raise RunFolderError(
                f"run folder: {self.path} has no config.json: no run has begun there that could "
                f"go on; start one{where} with --out"
            )
        cure = "put a copy of it back, or start another run with --out"
        raw = read_json(self.config_file, cure)
        try:
            config = msgspec.convert(raw, RunConfig)
        except msgspec.ValidationError as error:
            raise RunFolderError(
                f"run folder: {self.config_file} is not valid: {error}; {cure}"
            ) from None
        if msgspec.json.decode(msgspec.json.encode(config)) != raw:
            raise RunFolderError(
                f"run folder: {self.config_file} has other keys than this version's configuration"
            )
        return config

    def begin(self, config: RunConfig, step: int = 0) -> None:
        """Begin or resume a run at `step`; drop metrics of later steps.

        The configuration is written first: from then on a killed run can be resumed. Raises
        RunFolderError for a complete run, unless `config` asks for more steps, and for a folder
        that cannot be written.
        """
        if self.is_complete() and not 0 < step < config.training.steps:
            raise RunFolderError(f"run folder: {self.path} holds a complete run; choose another")
        kept = [record for record in self.metrics() if record["step"] < step]
        if missing := set(range(step)) - {r["step"] for r in kept if r["event"] == "step"}:
            logger.warning(
                "run folder: %s lacks %d of the %d steps before the checkpoint",
                self.metrics_file,
                len(missing),
                step,
            )
        lines = b"".join(msgspec.json.encode(record) + b"\n" for record in kept)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.summary_file.unlink(missing_ok=True)
            write_atomically(self.config_file, msgspec.json.format(msgspec.json.encode(config)))
            write_atomically(self.metrics_file, lines)
        except OSError as error:
            raise RunFolderError(
                f"run folder: {self.path} cannot be written ({error.strerror}); "
                "choose another place with --out"
            ) from None

    def metrics(self) -> list[dict[str, Any]]:
        """Return all records of the metrics; raise RunFolderError for an invalid line."""
        return self.records.read()

    def has_validation(self, step: int) -> bool:
        """Return True if there is a validation after `step`, counted from 0."""
        return any(r["event"] == "validation" and r["step"] == step for r in self.metrics())

    def save_model(self, weights: Mapping[str, Tensor]) -> None:
        """Write the weights as safetensors."""
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        write_atomically(self.model_file, save(plain, metadata={"format": "pt"}))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the summary, which marks the run as complete."""
        write_atomically(self.summary_file, msgspec.json.format(msgspec.json.encode(summary)))

    def figures(self) -> dict[str, Any]:
        """Compute the figures of the summary from the metrics of all steps."""
        records = self.metrics()
        steps = [record for record in records if record["event"] == "step"]
        losses = [record["loss"] for record in records if record["event"] == "validation"]
        return {
            "validation_loss": losses[-1],
            "seconds_per_step": median(record["seconds"] for record in steps),
            "largest_gradient_norm": max(record["gradient_norm"] for record in steps),
            "steps": len(steps),
        }

    def summary(self) -> dict[str, Any]:
        """Return the summary of a complete run; raise RunFolderError if figures are missing."""
        again = f"mhc train --resume {shlex.quote(str(self.path))}"
        cure = f"delete it, and {again} writes it again"
        summary = read_json(self.summary_file, cure)
        if not isinstance(summary, dict):
            raise damaged_error(self.summary_file, "figures are missing", cure)
        if "diverged_at" in summary:
            if not isinstance(summary["diverged_at"], int):
                raise damaged_error(self.summary_file, "diverged_at is no step", cure)
            return summary
        for key in sorted(SUMMARY):
            if not is_number(summary.get(key, "missing")):
                raise damaged_error(self.summary_file, f"{key} is missing or no number", cure)
        return summary
