"""Variants of the connection, trained with the same data, order and budget under several seeds."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from manifold_hc.config import ConnectionConfig
from manifold_hc.data import Corpus
from manifold_hc.diagnostics import GainMonitor
from manifold_hc.errors import DivergedError, RunFolderError
from manifold_hc.parallel import Processes
from manifold_hc.study.records import (
    check_folder,
    comparison_record,
    run_folder,
    with_new,
    write_record,
)
from manifold_hc.training import (
    Checkpoints,
    InitialWeights,
    RunConfig,
    RunFolder,
    check,
    train,
)
from manifold_hc.training.config import differences
from manifold_hc.training.preflight import warn_of_warmup
from manifold_hc.training.record import COMPARISON, machine


@dataclass(frozen=True)
class Variant:
    """One connection of a comparison, by a name of its own."""

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
    initial: InitialWeights | None = None,
) -> None:
    """Train every variant with seeds `training.seed`, +1, ... into `folder/variant/seed-N`.

    Complete runs are kept, unfinished ones resume from their last checkpoint. A run that diverges
    is recorded as diverged, and the next one starts.

    Args:
        config: everything that the variants share; its `connection` is not used.
        variants: connections to compare.
        seeds: number of seeds of each variant.
        corpus: text of all runs.
        folder: of the comparison, new or with runs of the same configuration and data.
        command: command line, kept in `comparison.json`.
        console: shows progress; standard error if left out.
        initial: weights that all runs start from, such as those of a residual run; with other seeds
            they see the data in another order.

    Raises:
        DataError: for a text that is too short.
        ConfigError: for a device that this machine lacks.
        RunFolderError: if the folder holds a run with another configuration, other data or other
            initial weights.
        CheckpointError: if the initial weights are damaged. All are raised before anything is
            written.
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
    origin = None
    if initial is not None:
        initial.verify(Processes())
        origin = initial.origin
    _check_same(folder, data, origin, [(run, wanted) for _, run, wanted in planned])
    before = comparison_record(folder)
    record = {
        "commands": with_new(before.get("commands", []), command),
        "variants": with_new(before.get("variants", []), *(variant.name for variant in variants)),
        "data_sha256": data,
        "data_tokens": len(corpus),
        **({} if origin is None else {"init": origin}),
        **machine(),
    }
    write_record(folder / COMPARISON, record)
    if not all(run.is_complete() for _, run, _ in planned):
        warn_of_warmup(config)
    for title, run, wanted in planned:
        if run.is_complete():
            console.print(f"{title}  complete, kept", highlight=False)
            continue
        try:
            checkpoint = Checkpoints(run.checkpoints, wanted.checkpoint, data).find()
            train(wanted, corpus, run, [GainMonitor], console, title, checkpoint, initial)
        except DivergedError as error:
            console.print(f"{title}  {error}", highlight=False)
            run.finish({"diverged_at": error.step, "diverged": error.quantity})


def _check_same(
    folder: Path,
    data: str,
    origin: dict[str, Any] | None,
    planned: list[tuple[RunFolder, RunConfig]],
) -> None:
    """Raise RunFolderError if `folder` has other data, initial weights or configurations."""
    check_folder(folder)
    known = comparison_record(folder)
    if known and known["data_sha256"] != data:
        raise RunFolderError(
            f"run folder: {folder} holds runs on other data; choose another with --out"
        )
    before, now = known.get("init", {}), origin or {}
    if known and any(before.get(key) != now.get(key) for key in ("sha256", "connections")):
        raise RunFolderError(
            f"run folder: {folder} holds runs from other initial weights; choose another with --out"
        )
    for run, wanted in planned:
        if not run.config_file.exists():
            continue
        # The path of the data may differ: the digest has shown that the tokens are the same.
        differing = [key for key in differences(run.config(), wanted) if key != "data.paths"]
        if differing:
            raise RunFolderError(
                f"run folder: {run.path} holds a run with another configuration "
                f"({', '.join(differing)}); choose another with --out"
            )
