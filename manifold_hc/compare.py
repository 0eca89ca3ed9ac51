"""Several variants of the connection under the same data, order and budget."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from manifold_hc.config import ConnectionConfig
from manifold_hc.data import Corpus
from manifold_hc.diagnostics import GainMonitor
from manifold_hc.errors import DivergedError, RunFolderError
from manifold_hc.files import remove_temporaries, write_atomically
from manifold_hc.training import Checkpoints, RunConfig, RunFolder, check, train
from manifold_hc.training.config import differences
from manifold_hc.training.folder import is_empty
from manifold_hc.training.json_files import read_record
from manifold_hc.training.preflight import warn_of_warmup
from manifold_hc.training.record import COMPARISON, machine


@dataclass(frozen=True)
class Variant:
    """One column of a comparison."""

    name: str
    connection: ConnectionConfig


def compare(
    config: RunConfig,
    variants: Sequence[Variant],
    seeds: int,
    corpus: Corpus,
    folder: Path,
    command: str,
    console: Console | None = None,
) -> None:
    """Train every variant with seeds `training.seed`, +1, ... into `folder/variant/seed-N`.

    Complete runs are kept, unfinished ones go on from their last checkpoint. A run that
    diverges is recorded as such. Raises, before anything is written: DataError for a text too
    short, ConfigError for a device that is not there, RunFolderError when the folder holds a run of
    the same name with another configuration or other data.
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
    check(config, corpus)
    data = corpus.digest
    _check_same(folder, data, [(run, wanted) for _, run, wanted in planned])
    before = comparison_record(folder)
    record = {
        "commands": _with(before.get("commands", []), command),
        "variants": _with(before.get("variants", []), *(variant.name for variant in variants)),
        "data_sha256": data,
        "data_tokens": len(corpus),
        **machine(),
    }
    remove_temporaries(folder / COMPARISON)
    write_atomically(folder / COMPARISON, json.dumps(record, indent=2) + "\n")
    if not all(run.is_complete() for _, run, _ in planned):
        warn_of_warmup(config)
    for title, run, wanted in planned:
        if run.is_complete():
            console.print(f"{title}  complete, kept", highlight=False)
            continue
        try:
            at = Checkpoints(run.checkpoints, wanted.checkpoint, data).find()
            train(wanted, corpus, run, [GainMonitor], console, title, at)
        except DivergedError as error:
            console.print(f"{title}  {error}", highlight=False)
            run.finish({"diverged_at": error.step, "diverged": error.what})


def run_folder(folder: Path, variant: str, seed: int) -> RunFolder:
    """Where one run of a comparison lives."""
    return RunFolder(folder / variant / f"seed-{seed}")


def comparison_record(folder: Path) -> dict[str, Any]:
    """Commands, variants, data, machine and versions of a comparison; empty if it is none.

    Raises RunFolderError when the record is damaged.
    """
    wanted = {"commands": list[str], "variants": list[str], "data_sha256": str}
    each = f"mhc report {shlex.quote(str(folder))}/VARIANT/seed-N"
    return read_record(
        folder / COMPARISON, wanted, f"put a copy of it back, or see each run: {each}"
    )


def check_folder(folder: Path) -> None:
    """Raise RunFolderError for a folder that holds something else than a comparison."""
    if not comparison_record(folder) and not is_empty(folder):
        raise RunFolderError(
            f"run folder: {folder} holds files of something else; choose another with --out"
        )


def _check_same(folder: Path, data: str, planned: list[tuple[RunFolder, RunConfig]]) -> None:
    check_folder(folder)
    known = comparison_record(folder)
    if known and known["data_sha256"] != data:
        raise RunFolderError(
            f"run folder: {folder} holds runs on other data; choose another with --out"
        )
    for run, wanted in planned:
        if not run.config_file.exists():
            continue
        differing = [key for key in differences(run.config(), wanted) if key != "data.paths"]
        if differing:
            raise RunFolderError(
                f"run folder: {run.path} holds a run with another configuration "
                f"({', '.join(differing)}); choose another with --out"
            )


def _with(known: list[str], *new: str) -> list[str]:
    return list(dict.fromkeys([*known, *new]))
