"""Complete runs, read from their folders."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from manifold_hc.diagnostics.gain import AmaxGain
from manifold_hc.errors import RunFolderError
from manifold_hc.study.records import comparison_record
from manifold_hc.training import RunConfig, RunFolder
from manifold_hc.training.folder import resume_command
from manifold_hc.training.json_files import damaged_error

Numbers = list[float | None]


class GainRecord(msgspec.Struct):
    """Members of a gain monitor's record that a report uses; null if a number is not finite."""

    gain_forward: float | None
    gain_backward: float | None
    gains: dict[str, Numbers]
    matrices: dict[str, Numbers]
    composite: list[list[Numbers]]
    log_column_sum: Numbers
    composite_log_column_sum: Numbers
    stochastic_distance: Numbers
    stream_cosine: Numbers
    stream_rank: Numbers


def largest(values: Iterable[float]) -> float:
    """Return the largest value that is not NaN; NaN if all are."""
    return max((value for value in values if not math.isnan(value)), default=math.nan)


@dataclass(frozen=True)
class Run:
    """One run: configuration, summary and metrics."""

    variant: str
    config: RunConfig
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return self.config.training.seed

    @property
    def diverged_at(self) -> int | None:
        """First step with a loss or gradient norm that is not finite; None if the run completed."""
        step: int | None = self.summary.get("diverged_at")
        return step

    @cached_property
    def gains(self) -> list[dict[str, Any]]:
        """Stability figures of every probed step."""
        return [record for record in self.metrics if record["event"] == "gain"]

    def series(self, event: str, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Return steps and values of one figure over training."""
        records = [record for record in self.metrics if record["event"] == event]
        steps = np.array([record["step"] for record in records], dtype=np.int64)
        return steps, np.array([record[key] for record in records], dtype=np.float64)

    def largest(self, key: str) -> float:
        """Return the largest value of a stability figure over training; NaN without any."""
        return largest(record[key] for record in self.gains)


def load_runs(folder: Path) -> list[Run]:
    """Load the complete runs of a comparison, by variant and seed, or a single run.

    Raises RunFolderError if there is none or a file is damaged.
    """
    found = [(folder, "")] if RunFolder(folder).is_complete() else []
    variants = comparison_record(folder).get("variants", [])
    for variant in variants:
        complete = [file.parent for file in (folder / variant).glob("seed-*/summary.json")]
        numbered = [path for path in complete if _seed(path).isdecimal()]
        found += [(path, variant) for path in sorted(numbered, key=lambda path: int(_seed(path)))]
    if not found and variants:
        raise RunFolderError(
            f"report: {folder} holds no complete run yet; the mhc compare that began it goes on"
        )
    if not found:
        raise _not_complete(RunFolder(folder))
    return [_load(RunFolder(path), variant) for path, variant in found]


def _not_complete(run: RunFolder) -> RunFolderError:
    """Return the error for a folder without a complete run, with the steps of an unfinished one."""
    if not run.config_file.exists():
        return RunFolderError(f"report: {run.path} holds no complete run; is it a run folder?")
    config = run.config()
    steps = sum(record["event"] == "step" for record in run.metrics())
    return RunFolderError(
        f"report: {run.path} is not complete, {steps} of {config.training.steps} steps; "
        f"go on with: {resume_command(run.path, config)}"
    )


def _seed(path: Path) -> str:
    return path.name.removeprefix("seed-")


def _load(run: RunFolder, variant: str) -> Run:
    config, metrics = run.config(), run.metrics()
    _require_gains(run.metrics_file, metrics)
    name = variant or config.connection.kind
    return Run(name, config, _with_nan(run.summary()), _with_nan(metrics))


def _require_gains(file: Path, records: list[dict[str, Any]]) -> None:
    """Raise RunFolderError for a record of the gain monitor that is not valid."""
    for number, record in enumerate(records, start=1):
        if record["event"] != "gain":
            continue
        repair = f"delete line {number}"
        try:
            found = msgspec.convert(record, GainRecord)
        except msgspec.ValidationError as error:
            raise damaged_error(file, f"a gain record is not valid: {error}", repair) from None
        if not _is_consistent(found):
            raise damaged_error(file, "a gain record is cut", repair)


def _is_consistent(record: GainRecord) -> bool:
    """Return True if all figures have the same number of sublayers and composites are square."""
    L, n = len(record.composite), len(next(iter(record.composite), ()))
    averages = (record.gains, record.matrices)
    lists = [average.get(row, []) for average in averages for row in AmaxGain._fields]
    lists += [record.log_column_sum, record.composite_log_column_sum, record.stochastic_distance]
    lists += [record.stream_cosine, record.stream_rank]
    square = all([len(row) for row in matrix] == [n] * n for matrix in record.composite)
    return L > 0 and n > 0 and square and all(len(numbers) == L for numbers in lists)


def _with_nan(value: Any) -> Any:
    """Replace every null by NaN; the writer replaces numbers that are not finite by null."""
    if isinstance(value, dict):
        return {key: _with_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_nan(item) for item in value]
    return math.nan if value is None else value
