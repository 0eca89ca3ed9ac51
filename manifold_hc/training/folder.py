"""A run folder: the one place that knows where a run keeps what.

config.json        the configuration
metrics.jsonl      one record a line: {"event": "step" | "validation" | ..., "step": ...}
checkpoints/       what the run goes on from, a folder a step
model.safetensors  the final weights
summary.json       the run's figures; its presence means that the run is complete
"""

import logging
import os
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

import filelock
import msgspec
from safetensors.torch import save
from torch import Tensor

from manifold_hc.errors import ManifoldError, RunFolderError
from manifold_hc.files import (
    is_permanent,
    read_regular,
    remove_temporaries,
    write_atomically,
)
from manifold_hc.training.config import RunConfig

logger = logging.getLogger("manifold_hc")

RECORDS = {"step": ("loss", "gradient_norm", "seconds"), "validation": ("loss",)}
"""What the trainer's own records always hold; observers' records are their own."""

LOOKS, PAUSE = 20, 0.5
"""How often, and how many seconds apart, a process looks for what another one has written."""

SUMMARY = {
    "validation_loss",
    "seconds_per_step",
    "largest_gradient_norm",
    "parameters",
    "steps",
}
"""What the summary of a run that reached its end holds."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the folder for this process; RunFolderError when that cannot be."""
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
    """Raise RunFolderError when another process holds the folder; leaves nothing in any other."""
    if (path / ".lock").exists():
        with locked(path):
            pass


def is_empty(path: Path) -> bool:
    """Whether nothing but hidden files, such as the lock, is at `path`."""
    return not path.is_dir() or all(found.name.startswith(".") for found in path.iterdir())


def damaged(file: Path, how: str, cure: str) -> RunFolderError:
    """The error for a file of a run that does not hold what it should."""
    return RunFolderError(f"run folder: {file} is damaged: {how}; {cure}")


def read_json(file: Path, cure: str) -> Any:
    """What a JSON file of a run holds; RunFolderError, with the `cure`, when it is damaged."""
    try:
        return msgspec.json.decode(read_regular(file))
    except FileNotFoundError:
        raise RunFolderError(f"run folder: {file.parent} has no {file.name}") from None
    except OSError as error:
        raise RunFolderError(f"run folder: {file} cannot be read: {error.strerror}") from None
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise damaged(file, str(error), cure) from None


def _is_number(value: object) -> bool:
    """Whether a value of a record is a number, or the null of one that was not finite."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _problem(record: Mapping[str, Any]) -> str:
    """What makes a line of the metrics no record; empty if nothing does."""
    event, step = record.get("event"), record.get("step")
    if not isinstance(event, str):
        return "has no event"
    if not isinstance(step, int) or isinstance(step, bool):
        return "has no step"
    wrong = (key for key in RECORDS.get(event, ()) if not _is_number(record.get(key, "missing")))
    return next((f"has no number as {key}" for key in wrong), "")


def resume_command(path: Path, config: RunConfig) -> str:
    """The command that goes on with the run in a folder."""
    size = config.parallel.size
    command = f"torchrun --nproc-per-node {size} -m manifold_hc" if size > 1 else "mhc"
    return f"{command} train --resume {shlex.quote(str(path))}"


class RunFolder:
    """What a run has written, and where the next thing goes."""

    def __init__(self, path: Path) -> None:
        """Nothing is created or read."""
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._held = b""
        self.config_file = path / "config.json"
        self.metrics_file = path / "metrics.jsonl"
        self.model_file = path / "model.safetensors"
        self.summary_file = path / "summary.json"
        self._job_file = path / ".job"

    def belong_to(self, job: str) -> None:
        """Remember which job of torchrun's trains here."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self._job_file, job)

    def is_of(self, job: str | None) -> bool:
        """Whether it belongs to that job."""
        try:
            known = read_regular(self._job_file) if self._job_file.exists() else None
        except OSError as error:
            raise self._unreadable(self._job_file, error) from None
        return known is not None and job is not None and known == job.encode()

    def require_shared(self, config: RunConfig) -> None:
        """Raise RunFolderError where this process does not see what the first one has begun."""
        for _ in range(LOOKS):
            if self.config_file.exists() and self.config() == config:
                return
            time.sleep(PAUSE)
        raise RunFolderError(
            f"run folder: process {os.environ.get('RANK')} does not see {self.path} as the first "
            "one does; --out must be on a file system that all processes share"
        )

    def is_new(self) -> bool:
        """Whether a run may start here.

        Nothing is there but hidden files and what a run killed before its configuration leaves.
        """
        if not self.path.is_dir():
            return True
        shown = {found for found in self.path.iterdir() if not found.name.startswith(".")}
        worthless = {self.checkpoints} if is_empty(self.checkpoints) else set()
        if self.metrics_file in shown and not self.metrics_file.stat().st_size:
            worthless.add(self.metrics_file)
        return shown <= worthless

    def clean(self) -> None:
        """Remove temporary files that a killed run left; for the process that holds the folder."""
        files = (self.config_file, self.metrics_file, self.model_file, self.summary_file)
        remove_temporaries(*files, self._job_file)

    def is_complete(self) -> bool:
        """Whether the run reached its end."""
        return self.summary_file.exists()

    def config(self) -> RunConfig:
        """The run's configuration; RunFolderError unless it is whole and of this version."""
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
        """Start a run at `step`: metrics from there on, of a run cut short, are dropped.

        The configuration is written first: from then on a run that is killed can go on. Raises
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

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line to the metrics, null for a number that is not finite.

        Lines that a full disk does not take are held, and written with the next. Raises
        ManifoldError where the file cannot be written at all.
        """
        held = bool(self._held)
        self._held += msgspec.json.encode(record) + b"\n"
        try:
            self.flush()
        except OSError as error:
            if is_permanent(error):
                raise ManifoldError(
                    f"run folder: {self.metrics_file} cannot be written: {error.strerror}; "
                    "mend that and go on with --resume"
                ) from None
            if not held:
                logger.error("METRICS CANNOT BE WRITTEN, held in memory: %s", error.strerror)

    def flush(self) -> None:
        """Write what `append` holds; OSError, and a file as before, where that cannot be."""
        if not self._held:
            return
        before = self.metrics_file.stat().st_size if self.metrics_file.exists() else 0
        try:
            with self.metrics_file.open("ab") as file:
                file.write(self._held)
        except OSError:
            with suppress(OSError):
                os.truncate(self.metrics_file, before)
            raise
        self._held = b""

    def metrics(self) -> list[dict[str, Any]]:
        """All records so far; a last line cut short by a crash is left out.

        Raises RunFolderError for a line that is no record.
        """
        try:
            written = read_regular(self.metrics_file) if self.metrics_file.exists() else b""
        except OSError as error:
            raise self._unreadable(self.metrics_file, error) from None
        lines = [*written.split(b"\n")[:-1], *self._held.split(b"\n")[:-1]]
        records: list[dict[str, Any]] = []
        for number, line in enumerate(lines, start=1):
            cure = f"delete line {number}"
            try:
                record = msgspec.json.decode(line, type=dict[str, Any])
            except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
                raise damaged(self.metrics_file, f"line {number}: {error}", cure) from None
            if problem := _problem(record):
                raise damaged(self.metrics_file, f"line {number} {problem}", cure)
            records.append(record)
        return records

    def has_validation(self, step: int) -> bool:
        """Whether the metrics hold a validation after `step`, counted from 0."""
        return any(r["event"] == "validation" and r["step"] == step for r in self.metrics())

    def save_model(self, weights: Mapping[str, Tensor]) -> None:
        """Write the weights as safetensors."""
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        write_atomically(self.model_file, save(plain, metadata={"format": "pt"}))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the summary, which marks the run as complete."""
        write_atomically(self.summary_file, msgspec.json.format(msgspec.json.encode(summary)))

    def figures(self) -> dict[str, Any]:
        """The summary of a run that reached its end, from its metrics."""
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
        """The figures of a complete run; RunFolderError when they are not there."""
        again = f"mhc train --resume {shlex.quote(str(self.path))}"
        cure = f"delete it, and {again} writes it again"
        summary = read_json(self.summary_file, cure)
        if not isinstance(summary, dict):
            raise damaged(self.summary_file, "figures are missing", cure)
        if "diverged_at" in summary:
            if not isinstance(summary["diverged_at"], int):
                raise damaged(self.summary_file, "diverged_at is no step", cure)
            return summary
        for key in sorted(SUMMARY):
            if not _is_number(summary.get(key, "missing")):
                raise damaged(self.summary_file, f"{key} is missing or no number", cure)
        return summary

    def _unreadable(self, file: Path, error: OSError) -> RunFolderError:
        return RunFolderError(f"run folder: {file} cannot be read: {error.strerror}")
