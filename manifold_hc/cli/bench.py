"""`mhc bench`."""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.markup import escape

from manifold_hc.cli.options import Group, device_option, json_option, judged_device
from manifold_hc.cli.terminal import console
from manifold_hc.errors import ConfigError, ManifoldError
from manifold_hc.files import write_atomically
from manifold_hc.training import PRESETS

LENGTHS = (1, 3, 10)
"""Blocks that `bench memory` measures beside none and the best."""

WIDE = 150
"""Columns that the table of implementations needs."""

dtype_option = click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    type=click.Choice(("float32", "bfloat16", "float16")),
    default=("float32", "bfloat16"),
    show_default=True,
    help="Of the streams; give it once for every table.",
)
allow_missing_option = click.option(
    "--allow-missing", is_flag=True, help="Exit with 0 although a peer is missing."
)
save_option = click.option(
    "--save", is_flag=True, help="Write benchmarks/results/DEVICE-DATE-BENCH.json too."
)


def _size(name: str, default: int, text: str) -> Callable[[Any], Any]:
    return click.option(
        name, type=click.IntRange(min=1), default=default, show_default=True, help=text
    )


@click.group(cls=Group)
def bench() -> None:
    """Time mHC beside other implementations of it, and inside a training step.

    \b
    mhc bench ops --tokens 2048 --streams 4 --channels 1280
    mhc bench step --preset 3b --dtype float32
    """


@bench.command()
@_size("--tokens", 2048, "Tokens of the one sequence.")
@_size("--streams", 4, "Streams n.")
@_size("--channels", 1280, "Channels C.")
@dtype_option
@click.option(
    "--numerics",
    type=click.Choice(("paper", "deepseek_v4")),
    default="paper",
    show_default=True,
    help="Of our own connection; peers keep theirs.",
)
@_size("--rounds", 20, "Samples of every implementation.")
@click.option("--eager", is_flag=True, help="Leave out what torch.compile makes.")
@device_option
@allow_missing_option
@save_option
@json_option
def ops(
    tokens: int,
    streams: int,
    channels: int,
    dtypes: tuple[str, ...],
    numerics: str,
    rounds: int,
    eager: bool,
    device: str,
    allow_missing: bool,
    save: bool,
    json_file: Path | None,
) -> None:
    """One connection, forward and backward, by every implementation there is.

    \b
    mhc bench ops --dtype bfloat16 --json ops.json

    Exit status 1 where an implementation computes something else, or a peer is missing.
    """
    from manifold_hc.bench import peers
    from manifold_hc.bench.ops import bench_ops
    from manifold_hc.bench.output.tables import ops_table
    from manifold_hc.bench.problem import Problem

    chosen = judged_device(device)
    terminal, found = console(), []
    problems = [
        Problem(tokens, streams, channels, dtype, numerics, chosen)  # type: ignore[arg-type]
        for dtype in dict.fromkeys(dtypes)
    ]
    if not allow_missing:
        wanted = [peer for problem in problems for peer in peers.for_problem(problem)]
        _judge("ops", [], [peer.package for peer in wanted if peer.version is None])
    with console(stderr=True).status("bench ops") as status:
        for problem in problems:
            found.append(bench_ops(problem, rounds, eager, lambda s: status.update(escape(s))))
    for table in found:
        terminal.print(ops_table(table, upright=terminal.width < WIDE))
    _write(chosen, save, json_file, ops=found)
    rows = [row for table in found for row in table.rows]
    _judge(
        "ops",
        [row.implementation for row in rows if row.state == "wrong"],
        [] if allow_missing else [row.implementation for row in rows if row.state == "missing"],
    )


@bench.command()
@click.option(
    "--preset",
    "name",
    type=click.Choice(tuple(PRESETS)),
    default="3b",
    show_default=True,
    help="Whose shapes.",
)
@_size("--tokens", 2048, "Tokens of the one sequence.")
@dtype_option
@_size("--rounds", 7, "Samples of every part.")
@device_option
@allow_missing_option
@save_option
@json_option
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
    """What mHC adds to a training step: its parts, timed one by one, summed to full depth.

    \b
    mhc bench step --preset 3b --dtype float32 --rounds 7

    A dense block and two blocks with experts are built, one after the other; the preset 3b needs
    about 12 GB of memory and some minutes.
    """
    from manifold_hc.bench import peers
    from manifold_hc.bench.output.tables import step_table
    from manifold_hc.bench.problem import Problem
    from manifold_hc.bench.step import PEER, bench_step
    from manifold_hc.training import preset

    chosen, config = judged_device(device), preset(name)
    if not allow_missing:
        known = {peer.package: peer for peer in peers.PEERS}
        _judge("step", [], [] if known[PEER].version else [PEER])
    found = []
    with console(stderr=True).status("bench step") as status:
        for dtype in dict.fromkeys(dtypes):
            problem = Problem(
                tokens, config.connection.streams, config.model.channels, dtype, device=chosen
            )
            say = lambda what: status.update(escape(what))  # noqa: E731
            found.append(bench_step(name, config, problem, rounds, say))
    for table in found:
        console().print(step_table(table))
    _write(chosen, save, json_file, step=found)
    missing = [kind for table in found for kind in table.missing]
    _judge("step", [], [] if allow_missing else missing)


@bench.command()
@_size("--sublayers", 60, "Sublayers L of the stack.")
@_size("--tokens", 2048, "Tokens of the one sequence.")
@_size("--streams", 4, "Streams n.")
@_size("--channels", 1280, "Channels C.")
@dtype_option
@click.option(
    "--recompute",
    "lengths",
    multiple=True,
    type=click.IntRange(min=1),
    help="Sublayers a block; give it once for every row. None and auto are there anyhow.",
)
@click.option("--single-pass", is_flag=True, help="Read with the pre of the sublayer before.")
@click.option(
    "--norms",
    type=click.Choice(("given", "inside")),
    default="given",
    show_default=True,
    help="To the connections, or inside the branches.",
)
@_size("--rounds", 5, "Samples of every block length.")
@device_option
@save_option
@json_option
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
    """What a stack holds for its backward pass by the length of its blocks, and what that costs.

    \b
    mhc bench memory --sublayers 24 --channels 256 --recompute 3 --recompute 8

    Without recompute the default sizes need about 8 GB in float32.
    """
    from manifold_hc.bench.output.tables import stack_table
    from manifold_hc.bench.problem import Problem
    from manifold_hc.bench.stacks import bench_stacks

    if wrong := [length for length in lengths if length > sublayers]:
        raise ConfigError(
            f"recompute: a block must have 1 to {sublayers} sublayers but has {wrong[0]}"
        )
    chosen = judged_device(device)
    terminal, found = console(), []
    chosen_lengths = lengths or [n for n in LENGTHS if n <= sublayers]
    with console(stderr=True).status("bench memory") as status:
        for dtype in dict.fromkeys(dtypes):
            problem = Problem(tokens, streams, channels, dtype, device=chosen)
            say = lambda what: status.update(escape(what))  # noqa: E731
            found.append(
                bench_stacks(problem, sublayers, chosen_lengths, single_pass, norms, rounds, say)
            )
    for table in found:
        terminal.print(stack_table(table, upright=terminal.width < WIDE))
    _write(chosen, save, json_file, memory=found)


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
    """Make the page of all benchmarks from the result files, and images/benchmarks.svg beside it.

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


def _write(device: str, save: bool, json_file: Path | None, **tables: Any) -> None:
    from manifold_hc.bench.output import results

    record = results.record(device, _command(), **tables)
    if json_file:
        write_atomically(json_file, results.as_json(record))
    if save:
        click.echo(f"results: {results.save(record)}")


def _command() -> str:
    """The line that was typed, without the file it leaves on this machine."""
    words = iter(["mhc", *sys.argv[1:]])
    kept = []
    for word in words:
        if word == "--json":
            next(words, None)
        elif not word.startswith("--json="):
            kept.append(word)
    return shlex.join(kept).encode(errors="backslashreplace").decode()


def _judge(name: str, wrong: list[str], missing: list[str]) -> None:
    """Raise ManifoldError, exit status 1, for what the table shows in red."""
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
