"""`mhc compare`."""

import shlex
import sys
from pathlib import Path

import click

from manifold_hc.cli.keys import override
from manifold_hc.cli.report import publish
from manifold_hc.cli.run_options import RunCommand, run_options
from manifold_hc.cli.terminal import console
from manifold_hc.compare import Variant
from manifold_hc.connection import ConnectionConfig
from manifold_hc.errors import ConfigError
from manifold_hc.training import RunConfig


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
    "hc:disable=pre,post. Give it once for every variant.",
)
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Seeds a variant, from training.seed on.",
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write the figures there too.",
)
def compare(
    config: RunConfig, out: Path, variants: tuple[str, ...], seeds: int, json_file: Path | None
) -> None:
    """Train variants on the same data in the same order, and show what stays stable.

    \b
    mhc compare --seeds 3 --out runs/three training.steps=300
    mhc compare --variant mhc --variant mhc:constraint=identity --out runs/identity

    Interrupted, the same command goes on with the runs that are missing.
    """
    from manifold_hc import compare as comparison
    from manifold_hc.data import load as load_text
    from manifold_hc.training.folder import locked

    chosen = [parse_variant(text, config.connection) for text in dict.fromkeys(variants)]
    tokens = load_text(config.data.path)
    command = shlex.join(["mhc", *sys.argv[1:]])
    with locked(out):
        comparison.compare(config, chosen, seeds, tokens, out, command, console(stderr=True))
        publish(out, out / "report.html", json_file)


def parse_variant(text: str, connection: ConnectionConfig) -> Variant:
    """`kind:key=value:key=value` on top of `connection`."""
    kind, *pairs = text.split(":")
    if "=" in kind:
        raise ConfigError(f"variant: {text!r} must start with residual, hc or mhc")
    changed = override(connection, [f"kind={kind}", *pairs])
    return Variant(text.replace(":", " ").replace("/", "-"), changed)
