"""`mhc convert`: connections of a checkpoint in the layout of another library."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.markup import escape
from rich.table import Table

from manifold_hc.cli.keys import describe, override
from manifold_hc.cli.terminal import console
from manifold_hc.constraints import ConstraintName
from manifold_hc.errors import ConfigError
from manifold_hc.numerics import ExitName, NumericsName

if TYPE_CHECKING:
    from manifold_hc.config import ConnectionConfig
    from manifold_hc.interop.layouts import Conversion

HUGGINGFACE = "huggingface"
"""Target that is a folder for `AutoModelForCausalLM`, not a layout."""

DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Hyperparameters:
    """Hyperparameters of the source that no tensor's shape holds; null for the value in its files.

    Attributes:
        numerics: Preset of orders and epsilons.
        constraint: Set of matrices that `res` is taken from.
        iterations: Sinkhorn-Knopp iterations.
        norm_eps: Epsilon of the RMS norm of the streams.
        hc_eps: Epsilon of pre and of Sinkhorn-Knopp.
        exit: Reduction of the streams after the last sublayer.
        single_pass: True if each sublayer reads with the pre of the one before.
    """

    numerics: NumericsName | None = None
    constraint: ConstraintName | None = None
    iterations: int | None = None
    norm_eps: float | None = None
    hc_eps: float | None = None
    exit: ExitName | None = None
    single_pass: bool | None = None


class ConvertCommand(click.Command):
    """A command whose --help lists the hyperparameters."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Add one row for each hyperparameter after the options."""
        rows = [(f"{key}=VALUE", sentence) for key, _, sentence in describe(Hyperparameters())]
        with formatter.section("Hyperparameters of SOURCE, where its files do not give them"):
            formatter.write_dl(rows)


@click.command(cls=ConvertCommand)
@click.argument("source", required=False, type=click.Path(path_type=Path))
@click.argument("target", required=False, type=click.Path(path_type=Path))
@click.argument("hyperparameters", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--to",
    "to",
    metavar="LAYOUT",
    help="Layout of TARGET, or huggingface; --list prints the layouts.",
)
@click.option(
    "--from",
    "from_",
    metavar="LAYOUT",
    help="Layout of SOURCE.  [default: by the names of its tensors]",
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Dtype of the connections.  [default: as in SOURCE]",
)
@click.option("--connections-only", is_flag=True, help="Leave all other tensors out.")
@click.option(
    "--inexact",
    is_flag=True,
    help="Convert although the other library computes another function.",
)
@click.option("--force", is_flag=True, help="Overwrite TARGET.")
@click.option("--list", "list_", is_flag=True, help="Print the layouts and their conventions.")
def convert(
    source: Path | None,
    target: Path | None,
    hyperparameters: tuple[str, ...],
    to: str | None,
    from_: str | None,
    dtype: str | None,
    connections_only: bool,
    inexact: bool,
    force: bool,
    list_: bool,
) -> None:
    """Convert the connections of a model to the layout of another library.

    \b
    mhc convert runs/mine mine.safetensors --to deepseek_v4 --connections-only
    mhc convert deepseek/ stack.safetensors --to manifold --connections-only
    mhc convert runs/mine exported --to huggingface
    mhc convert --list

    SOURCE is a safetensors file, a torch file, a folder with a model, or a run folder. No code in
    it is run. TARGET is a safetensors file. Every tensor is used, kept or named; one that is
    missing, left over, transposed or renamed is an error, and nothing is written.

    With --to huggingface, SOURCE is a run and TARGET is a folder that transformers loads.
    """
    if list_:
        _print_layouts()
        return
    if source is None or target is None or to is None:
        raise click.UsageError("needs SOURCE, TARGET and --to LAYOUT; --list prints the layouts")
    if to == HUGGINGFACE:
        if from_ or dtype or connections_only or inexact or force or hyperparameters:
            raise ConfigError(
                "convert: --to huggingface writes a run as it is and takes no other option; "
                "leave them out"
            )
        _export(source, target)
        return
    if target.exists() and not force:
        raise ConfigError(f"convert: {target} exists; choose another file, or give --force")
    if target.suffix != ".safetensors":
        raise ConfigError(
            f"convert: TARGET must end in .safetensors but is {target}; "
            "--to huggingface writes a run as a folder for transformers"
        )
    known = override(Hyperparameters(), hyperparameters)
    given = {field.name: getattr(known, field.name) for field in fields(known)}
    _convert(source, target, to, from_, dtype, given, connections_only, inexact)


def _convert(
    source: Path,
    target: Path,
    to: str,
    from_: str | None,
    dtype: str | None,
    given: dict[str, object],
    connections_only: bool,
    inexact: bool,
) -> None:
    import torch

    from manifold_hc.interop import layouts
    from manifold_hc.interop.safe_tensors import write_tensors

    layout = layouts.layout(to)
    checkpoint = layouts.open_checkpoint(source, from_, given)
    done = layouts.convert(
        checkpoint,
        layout,
        dtype=None if dtype is None else getattr(torch, dtype),
        connections_only=connections_only,
        inexact=inexact,
    )
    write_tensors(target, dict(done.tensors()), done.metadata)
    _print_conversion(done)
    click.echo(f"written: {target}")


def _export(source: Path, target: Path) -> None:
    """Write a run as a model of transformers."""
    from manifold_hc.interop.huggingface import export

    export(source, target)
    click.echo(f"written: {target}")


def _print_conversion(done: "Conversion") -> None:
    source = done.source
    rows = [
        ("layout", f"{source.layout.name} -> {done.layout.name}"),
        ("source numerics", _numerics(source.config)),
        ("target numerics", _numerics(done.config)),
        (
            "sizes",
            f"{done.config.n} streams, {source.channels} channels, {source.sublayers} sublayers",
        ),
        ("tensors", f"{len(source.used)} used, {len(done.connections)} written"),
        ("kept as they are", _grouped(done.kept)),
        ("left out", _grouped((*done.left_out, *source.files.left_out))),
        *(("note", note) for note in done.notes),
    ]
    table = Table.grid(padding=(0, 2))
    for name, text in rows:
        table.add_row(name, escape(text))
    console().print(table)


def _numerics(config: "ConnectionConfig") -> str:
    """Return the numerics of a configuration, with the epsilons that it takes from its preset."""
    from manifold_hc.numerics import preset

    used = preset(config.numerics, norm_eps=config.norm_eps, hc_eps=config.hc_eps)
    return (
        f"{config.numerics}, {config.constraint}, {config.iterations} iterations, "
        f"norm_eps {used.norm_eps:g}, hc_eps {used.hc_eps:g}, exit {config.exit_rule}"
    )


def _grouped(names: Iterable[str]) -> str:
    """Return the names with * in place of numbers, each with its count."""
    counts = Counter(re.sub(r"\d+", "*", name) for name in names)
    if not counts:
        return "none"
    listed = [f"{name} ({count})" if count > 1 else name for name, count in counts.items()]
    return f"{counts.total()}: {', '.join(listed)}"


def _print_layouts() -> None:
    from manifold_hc.interop.layouts import conventions

    for line in conventions():
        click.echo(line)
