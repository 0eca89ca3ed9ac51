"""`mhc bench`."""

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import click
from rich.markup import escape

from manifold_hc.cli.options import Group, device_option, json_option, judged_device
from manifold_hc.cli.terminal import console
from manifold_hc.errors import ConfigError, ManifoldError
from manifold_hc.files import write_atomically
from manifold_hc.training import PRESETS

Option = Callable[[Any], Any]

LENGTHS = (1, 3, 10)
"""Lengths of recompute blocks that `bench memory` measures by default, with none and "auto"."""


def _count(name: str, default: int, text: str) -> Option:
    return click.option(
        name, type=click.IntRange(min=1), default=default, show_default=True, help=text
    )


def _options(*options: Option) -> Option:
    """One decorator that adds several options, in this order."""
    return lambda command: reduce(lambda f, option: option(f), reversed(options), command)


size_options = _options(
    _count("--tokens", 2048, "Tokens of the one sequence."),
    _count("--streams", 4, "Streams n."),
    _count("--channels", 1280, "Channels C."),
)
allow_missing_option = click.option(
    "--allow-missing", is_flag=True, help="Exit with 0 although a peer is missing."
)
output_options = _options(
    click.option(
        "--dtype",
        "dtypes",
        multiple=True,
        type=click.Choice(("float32", "bfloat16", "float16")),
        default=("float32", "bfloat16"),
        show_default=True,
        help="Dtype of the streams; give it once for every table.",
    ),
    device_option,
    click.option(
        "--save", is_flag=True, help="Write benchmarks/results/DEVICE-DATE-BENCH.json too."
    ),
    json_option,
)


@click.group(cls=Group)
def bench() -> None:
    """Time mHC against other implementations of it, and inside a training step.

    \b
    mhc bench ops --tokens 2048 --streams 4 --channels 1280
    mhc bench step --preset 3b --dtype float32
    """


@bench.command()
@size_options
@click.option(
    "--numerics",
    type=click.Choice(("paper", "deepseek_v4")),
    default="paper",
    show_default=True,
    help="Numerics of our own connection; peers keep theirs.",
)
@_count("--rounds", 20, "Samples of every implementation.")
@click.option("--eager", is_flag=True, help="Leave out code that torch.compile generates.")
@allow_missing_option
@output_options
def ops(
    tokens: int,
    streams: int,
    channels: int,
    dtypes: tuple[str, ...],
    numerics: Any,
    rounds: int,
    eager: bool,
    device: str,
    allow_missing: bool,
    save: bool,
    json_file: Path | None,
) -> None:
    """Time one connection, forward and backward, by every implementation on the device.

    \b
    mhc bench ops --dtype bfloat16 --json ops.json

    Exit status 1 if an implementation has wrong results, or a peer is missing.
    """
    from manifold_hc.bench import peers
    from manifold_hc.bench.ops import bench_ops
    from manifold_hc.bench.problem import Problem

    chosen = judged_device(device)
    problems = [
        Problem(tokens, streams, channels, dtype, numerics, chosen)
        for dtype in dict.fromkeys(dtypes)
    ]
    if not allow_missing:
        wanted = [peer for problem in problems for peer in peers.for_problem(problem)]
        _require("ops", missing=[peer.package for peer in wanted if peer.version is None])
    with _progress("ops") as progress:
        found = [bench_ops(problem, rounds, eager, progress) for problem in problems]
    _print_and_write("ops", chosen, found, save, json_file)
    rows = [row for result in found for row in result.rows]
    missing = [row.implementation for row in rows if row.state == "missing"]
    _require(
        "ops",
        wrong=[row.implementation for row in rows if row.state == "wrong"],
        missing=[] if allow_missing else missing,
    )


@bench.command()
@click.option(
    "--preset",
    "name",
    type=click.Choice(tuple(PRESETS)),
    default="3b",
    show_default=True,
    help="Preset whose shapes are timed.",
)
@_count("--tokens", 2048, "Tokens of the one sequence.")
@_count("--rounds", 7, "Samples of every part.")
@allow_missing_option
@output_options
def step(
    name: str,
    tokens: int,
    dtypes: tuple[str, ...],
    rounds: int,
    device: str,
    allow_missing: bool,
    save: bool,
    json_file: Path | None,
) -> None:
    """Time the parts of a training step one by one, and sum to full depth the time mHC adds.

    \b
    mhc bench step --preset 3b --dtype float32 --rounds 7

    A dense block and two blocks with experts are built, one after the other; the preset 3b needs
    about 12 GB of memory and some minutes.
    """
    from manifold_hc.bench import peers
    from manifold_hc.bench.problem import Problem
    from manifold_hc.bench.step import PEER, bench_step
    from manifold_hc.training import preset

    chosen, config = judged_device(device), preset(name)
    if not allow_missing:
        known = {peer.package: peer for peer in peers.PEERS}
        _require("step", missing=[] if known[PEER].version else [PEER])
    sizes = tokens, config.connection.streams, config.model.channels
    with _progress("step") as progress:
        found = [
            bench_step(name, config, Problem(*sizes, dtype, device=chosen), rounds, progress)
            for dtype in dict.fromkeys(dtypes)
        ]
    _print_and_write("step", chosen, found, save, json_file)
    missing = [kind for result in found for kind in result.missing]
    _require("step", missing=[] if allow_missing else missing)


@bench.command()
@_count("--sublayers", 60, "Sublayers L of the stack.")
@size_options
@click.option(
    "--recompute",
    "lengths",
    multiple=True,
    type=click.IntRange(min=1),
    help="Sublayers in a recompute block; give it once for every row. "
    "No recompute, and the length of auto, are always measured.",
)
@click.option("--single-pass", is_flag=True, help="Read with the pre of the previous sublayer.")
@click.option(
    "--norms",
    type=click.Choice(("given", "inside")),
    default="given",
    show_default=True,
    help="Norms given to the connections, or inside the branches.",
)
@_count("--rounds", 5, "Samples of every block length.")
@output_options
def memory(
    sublayers: int,
    tokens: int,
    streams: int,
    channels: int,
    dtypes: tuple[str, ...],
    lengths: tuple[int, ...],
    single_pass: bool,
    norms: Any,
    rounds: int,
    device: str,
    save: bool,
    json_file: Path | None,
) -> None:
    """Count the bytes a stack holds for backward, by recompute block length, and time recompute.

    \b
    mhc bench memory --sublayers 24 --channels 256 --recompute 3 --recompute 8

    Without recompute the default sizes need about 8 GB in float32.
    """
    from manifold_hc.bench.problem import Problem
    from manifold_hc.bench.stacks import bench_stacks

    if wrong := [length for length in lengths if length > sublayers]:
        raise ConfigError(
            f"recompute: a block must have 1 to {sublayers} sublayers but has {wrong[0]}"
        )
    chosen = judged_device(device)
    tried = lengths or [length for length in LENGTHS if length <= sublayers]
    with _progress("memory") as progress:
        found = [
            bench_stacks(
                Problem(tokens, streams, channels, dtype, device=chosen),
                sublayers,
                tried,
                single_pass,
                norms,
                rounds,
                progress,
            )
            for dtype in dict.fromkeys(dtypes)
        ]
    _print_and_write("memory", chosen, found, save, json_file)


@bench.command()
@click.option(
    "--results",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path("benchmarks/results"),
    show_default=True,
    metavar="DIR",
    help="Folder of the result files.",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("docs/benchmarks.md"),
    show_default=True,
    metavar="FILE",
    help="The page.",
)
def page(results: Path, out: Path) -> None:
    """Make the page of all benchmarks, and images/benchmarks.svg, from the result files.

    \b
    mhc bench page
    """
    from manifold_hc.bench.output.chart import chart
    from manifold_hc.bench.output.page import page

    write_atomically(out, page(results))
    click.echo(f"page: {out}")
    if drawn := chart(results):
        file = out.parent / "images/benchmarks.svg"
        file.parent.mkdir(exist_ok=True)
        write_atomically(file, drawn)
        click.echo(f"chart: {file}")


@contextmanager
def _progress(bench: str) -> Iterator[Callable[[str], None]]:
    """Show the name of the current step on a terminal."""
    with console(stderr=True).status(f"bench {bench}") as status:
        yield lambda text: status.update(escape(text))


def _print_and_write(
    bench: Any, device: str, found: list[Any], save: bool, json_file: Path | None
) -> None:
    """Print the sheets of all results; write the result files that were asked for."""
    from manifold_hc.bench.output import results
    from manifold_hc.bench.output.renderers import terminal

    for sheet in (sheet for result in found for sheet in result.sheets()):
        console().print(terminal(sheet, console().width))
    record = results.record(bench, device, _command(), found)
    if json_file:
        write_atomically(json_file, results.as_json(record))
    if save:
        click.echo(f"results: {results.save(record)}")


def _command() -> str:
    """The typed command, without --json, whose file is on this machine only."""
    words = iter(["mhc", *sys.argv[1:]])
    kept = []
    for word in words:
        if word == "--json":
            next(words, None)
        elif not word.startswith("--json="):
            kept.append(word)
    return shlex.join(kept).encode(errors="backslashreplace").decode()


def _require(name: str, wrong: Sequence[str] = (), missing: Sequence[str] = ()) -> None:
    """Raise ManifoldError, exit status 1, if implementations are wrong or missing."""
    if wrong:
        raise ManifoldError(
            f"bench {name}: wanted float64's results within tolerance, got others from "
            f"{', '.join(dict.fromkeys(wrong))}; see the red lines and run `mhc verify`"
        )
    if missing:
        raise ManifoldError(
            f"bench {name}: wanted every peer, got none of {', '.join(dict.fromkeys(missing))}; "
            "pip install 'manifold-hc[bench]', or give --allow-missing"
        )
