"""`mhc compare`: train and compare variants."""

from dataclasses import replace
from pathlib import Path

import click

from manifold_hc.cli.keys import override
from manifold_hc.cli.options import (
    RunCommand,
    Wanted,
    drop_option,
    init_option,
    initial_source,
    json_option,
    require_effect,
    require_init,
    run_options,
)
from manifold_hc.cli.report import check_outputs, publish
from manifold_hc.cli.terminal import command_line, console
from manifold_hc.config import ConnectionConfig
from manifold_hc.errors import ConfigError, ManifoldError, StoppedError
from manifold_hc.parallel import ParallelConfig
from manifold_hc.study.compare import Variant
from manifold_hc.study.compare import compare as compare_variants
from manifold_hc.study.records import check_folder
from manifold_hc.training import InitialWeights, check, require_memory

MOST_SEEDS = 10_000
"""Largest number of seeds: all runs are planned before the first one starts."""


@click.command(cls=RunCommand)
@run_options
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("runs/compare"),
    show_default=True,
    metavar="DIR",
    help="Run folder; complete runs of the same configuration in it are kept.",
)
@click.option(
    "--variant",
    "variants",
    multiple=True,
    default=("residual", "hc", "mhc"),
    show_default=True,
    metavar="KIND[:KEY=VALUE]...",
    help="A kind of connection and its own keys, such as mhc:constraint=identity or "
    "hc:disable=pre,post. Give it once for every variant; it decides connection.kind.",
)
@click.option(
    "--seeds",
    type=click.IntRange(1, MOST_SEEDS),
    default=1,
    show_default=True,
    help="Seeds a variant, from training.seed on.",
)
@init_option
@click.option("--step", type=int, metavar="N", help="With --init: the checkpoint to take.")
@drop_option
@json_option
def compare(
    wanted: Wanted,
    out: Path,
    variants: tuple[str, ...],
    seeds: int,
    init: Path | None,
    step: int | None,
    drop_connections: bool,
    json_file: Path | None,
) -> None:
    """Train variants on the same data in the same order, and compare loss and stability.

    \b
    mhc compare --seeds 3 --out runs/three training.steps=300
    mhc compare --variant mhc --variant mhc:constraint=identity --out runs/identity
    mhc compare --init runs/residual --data more.txt --seeds 3 --out runs/tuned

    Interrupted, the same command goes on with the runs that are missing.
    """
    from manifold_hc.data import load
    from manifold_hc.training.folder import locked, refuse_if_in_use

    if step is not None and init is None:
        raise ConfigError("--step: belongs to --init; give the run folder with it")
    require_init(init, drop_connections=drop_connections)
    source = initial_source(wanted, init, step)
    initial = None if source is None else InitialWeights(source, drop_connections)
    config = wanted.config(
        None if source is None else source.config(),
        kinds=[text.partition(":")[0] for text in variants],
    )
    if any(pair.startswith("connection.kind=") for pair in wanted.overrides):
        raise ConfigError("connection.kind: --variant decides it; leave the key out")
    if config.parallel != ParallelConfig():
        raise ConfigError("compare: trains in one process; leave the keys of parallel alone")
    chosen = [parse_variant(text, config.connection) for text in dict.fromkeys(variants)]
    for variant in chosen:
        varied = replace(config, connection=variant.connection)
        if initial is not None:
            initial.require_fit(varied)
        require_memory(varied)
    corpus = load(config.data, config.model.vocabulary, console(stderr=True))
    check(config, corpus)
    refuse_if_in_use(out)
    check_folder(out)
    page = out / "report.html"
    check_outputs(page, json_file)
    with locked(out):
        try:
            compare_variants(
                config, chosen, seeds, corpus, out, command_line(), console(stderr=True), initial
            )
        except StoppedError as error:
            error.add_note("the same command goes on from there")
            raise
        runs = publish(out, page, json_file)
    if all(run.diverged_at is not None for run in runs):
        raise ManifoldError(
            f"compare: every run in {out} diverged; choose another configuration, such as a lower "
            "optimizer.lr, and another folder with --out"
        )


def parse_variant(text: str, connection: ConnectionConfig) -> Variant:
    """Parse `kind:key=value:key=value` as changes of `connection`."""
    kind, *pairs = text.split(":")
    if "=" in kind:
        raise ConfigError(f"variant: {text!r} must start with residual, hc or mhc")
    if "" in pairs:
        raise ConfigError(
            f"variant: {text!r} has nothing after a colon; give a key=value there, as in "
            "mhc:constraint=identity, or leave the colon out"
        )
    keys = [pair.partition("=")[0] for pair in pairs]
    if "kind" in keys:
        raise ConfigError(f"variant: {text!r} names its kind twice; leave kind= out")
    require_effect(keys, [kind])
    changed = override(connection, [f"kind={kind}", *pairs])
    return Variant(text.replace(":", " ").replace("/", "-"), changed)
