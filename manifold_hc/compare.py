"""Several variants of the connection under the same data, order and budget."""

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from rich.console import Console

from manifold_hc.connection import ConnectionConfig
from manifold_hc.data import Split
from manifold_hc.data.corpus import fingerprint
from manifold_hc.diagnostics import GainMonitor
from manifold_hc.errors import DivergedError, RunFolderError
from manifold_hc.files import write_atomically
from manifold_hc.training import RunConfig, RunFolder, train
from manifold_hc.training.trainer import find_device

COMPARISON = "comparison.json"


@dataclass(frozen=True)
class Variant:
    """One column of a comparison."""

    name: str
    connection: ConnectionConfig


def compare(
    config: RunConfig,
    variants: Sequence[Variant],
    seeds: int,
    tokens: np.ndarray,
    folder: Path,
    command: str,
    console: Console | None = None,
) -> None:
    """Train every variant with seeds `training.seed`, +1, ... into `folder/variant/seed-N`.

    Complete runs are kept, unfinished ones start again. A run that diverges is recorded as such.
    Raises, before anything is written: DataError for a text too short, ConfigError for a device
    that is not there, RunFolderError when the folder holds a run of the same name with another
    configuration or other data.
    """
    console = console or Console(stderr=True)
    planned = [
        (
            f"{variant.name} seed {seed}",
            run_folder(folder, variant.name, seed),
            replace(
                config,
                connection=variant.connection,
                training=replace(config.training, seed=seed),
            ),
        )
        for seed in range(config.training.seed, config.training.seed + seeds)
        for variant in variants
    ]
    Split.of(tokens, config.data.sequence, config.data.validation)
    find_device(config.training.device)
    data = fingerprint(tokens)
    _check_same(folder, data, [(run, wanted) for _, run, wanted in planned])
    record = {
        "command": command,
        "data_sha256": data,
        "data_tokens": len(tokens),
        "machine": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    write_atomically(folder / COMPARISON, json.dumps(record, indent=2) + "\n")
    for title, run, wanted in planned:
        if run.is_complete():
            console.print(f"{title}  complete, kept", highlight=False)
            continue
        try:
            train(wanted, tokens, run, [GainMonitor], console, title)
        except DivergedError as error:
            console.print(f"{title}  {error}", highlight=False)
            run.finish({"diverged_at": error.step, "diverged": error.what})


def run_folder(folder: Path, variant: str, seed: int) -> RunFolder:
    """Where one run of a comparison lives."""
    return RunFolder(folder / variant / f"seed-{seed}")


def comparison_record(folder: Path) -> dict[str, Any]:
    """Command, data, machine and versions of the comparison in `folder`; empty if it has none."""
    file = folder / COMPARISON
    record: dict[str, Any] = msgspec.json.decode(file.read_bytes()) if file.exists() else {}
    return record


def _check_same(folder: Path, data: str, planned: list[tuple[RunFolder, RunConfig]]) -> None:
    known = comparison_record(folder)
    if known and known["data_sha256"] != data:
        raise RunFolderError(
            f"run folder: {folder} holds runs on other data; choose another with --out"
        )
    if not known and folder.exists() and any(p.name != ".lock" for p in folder.iterdir()):
        raise RunFolderError(
            f"run folder: {folder} holds files of something else; choose another with --out"
        )
    for run, wanted in planned:
        if run.config_file.exists() and run.config() != wanted:
            raise RunFolderError(
                f"run folder: {run.path} holds a run with another configuration; "
                "choose another with --out"
            )
