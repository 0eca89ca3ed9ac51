"""Finished runs, read back from their folders."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from manifold_hc.errors import RunFolderError
from manifold_hc.training import RunConfig, RunFolder


@dataclass(frozen=True)
class Run:
    """One run: what it was and what it measured."""

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
        """The first step whose loss or gradient norm was not finite."""
        step: int | None = self.summary.get("diverged_at")
        return step

    @cached_property
    def gains(self) -> list[dict[str, Any]]:
        """The stability figures of every probed step."""
        return [record for record in self.metrics if record["event"] == "gain"]

    def series(self, event: str, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of one figure over training."""
        records = [record for record in self.metrics if record["event"] == event]
        steps = np.array([record["step"] for record in records], dtype=np.int64)
        return steps, np.array([record[key] for record in records], dtype=np.float64)

    def largest(self, key: str) -> float:
        """Largest value of a stability figure over training; NaN if none was taken."""
        values = [record[key] for record in self.gains if not math.isnan(record[key])]
        return max(values, default=math.nan)


def load_runs(folder: Path) -> list[Run]:
    """All complete runs below `folder`, a comparison or a single run, in the order they ran.

    Raises RunFolderError when there is none.
    """
    found = [
        RunFolder(file.parent)
        for file in sorted(folder.rglob("summary.json"), key=lambda file: file.stat().st_mtime_ns)
    ]
    if not found:
        raise RunFolderError(f"report: {folder} holds no complete run; is it a run folder?")
    return [
        Run(_variant(run, folder), run.config(), run.summary(), _with_nan(run.metrics()))
        for run in found
    ]


def _variant(run: RunFolder, folder: Path) -> str:
    """The variant's folder in a comparison, the kind of connection in a single run."""
    if run.path == folder:
        return run.config().connection.kind
    return run.path.relative_to(folder).parts[0]


def _with_nan(value: Any) -> Any:
    """NaN for every null: a number that was not finite when it was written."""
    if isinstance(value, dict):
        return {key: _with_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_nan(item) for item in value]
    return math.nan if value is None else value
