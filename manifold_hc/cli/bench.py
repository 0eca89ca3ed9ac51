"""`mhc bench`."""

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import click
from rich.markup import escape

from manifold_hc.cli.options import Group, device_option, float64_device, json_option
from manifold_hc.cli.terminal import console
from manifold_hc.errors import ConfigError, ManifoldError
from manifold_hc.files import write_atomically
from manifold_hc.training import PRESETS

LENGTHS = (1, 3, 10)
"""Lengths of recompute blocks that `bench memory` measures by default, with none and "auto"."""


@dataclass(frozen=True)
class Request:
    """One call of a bench: its dtypes, its device, and where the figures go."""

    bench: Any
    """ops, step, memory or transformers."""
    dtypes: tuple[str, ...]
    device: str
    save: bool
    json_file: Path | None

    def problems(self, tokens: int, streams: int, channels: int, **options: Any) -> list[Any]:
        """Return one problem for each dtype."""
        from manifold_hc.bench.problem import Problem

        return [
            Problem(tokens, streams, channels, dtype, device=self.device, **options)
            for dtype in dict.fromkeys(self.dtypes)
        ]

    @contextmanager
    def progress(self) -> Iterator[Callable[[str], None]]:
        """Show the name of the current measurement on a terminal."""
        with console(stderr=True).status(f"bench {self.bench}") as status:
            yield lambda text: status.update(escape(text))

    def show(self, found: Sequence[Any]) -> None:
        """Print the sheets of all results; write the files that were asked for."""
        from manifold_hc.bench.output import results

        for sheet in (sheet for result in found for sheet in result.sheets()):
            console().print(sheet.terminal(console().width))
        record = results.record(self.bench, self.device, _command(), list(found))
        if self.json_file:
            write_atomically(self.json_file, results.as_json(record))
        if self.save:
            click.echo(f"results: {results.save(record)}")

    def require(self, wrong: Sequence[str] = (), missing: Sequence[str] = ()) -> None:
        """Raise ManifoldError, exit status 1, if implementations are wrong or missing."""
        if wrong:
            raise ManifoldError(
                f"bench {self.bench}: wanted float64's results within tolerance, got others from "
                f"{', '.join(dict.fromkeys(wrong))}; see the red lines and run `mhc verify`"
            )
        if missing:
            raise ManifoldError(
                f"bench {self.bench}: wanted every peer, got none of "
                f"{', '.join(dict.fromkeys(missing))}; "
                "pip install 'manifold-hc[bench]', or give --allow-missing"
            )


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


def _count(name: str, default: int, text: str) -> Callable[[Any], Any]:
    return click.option(
        name, type=click.IntRange(min=1), default=default, show_default=True, help=text
    )


def size_options(command: Any) -> Any:
    """Add the options of a problem's size."""
    command = _count("--channels", 1280, "Channels C.")(command)
    command = _count("--streams", 4, "Streams n.")(command)
    return _count("--tokens", 2048, "Tokens of the one sequence.")(command)


allow_missing_option = click.option(
    "--allow-missing", is_flag=True, help="Exit with 0 although a peer is missing."
)


def request_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options that all benches share, and pass them as `request`."""

    @click.option(
        "--dtype",
        "dtypes",
        multiple=True,
        type=click.Choice(("float32", "bfloat16", "float16")),
        default=("float32", "bfloat16"),
        show_default=True,
        help="Dtype of the streams; give it once for every table.",
    )
    @device_option
    @click.option(
        "--save", is_flag=True, help="Write benchmarks/results/DEVICE-DATE-BENCH.json too."
    )
    @json_option
    @wraps(function)
    def command(
        dtypes: tuple[str, ...], device: str, save: bool, json_file: Path | None, **options: Any
    ) -> None:
        chosen = float64_device(device)
        function(request=Request(function.__name__, dtypes, chosen, save, json_file), **options)

    return command


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
@request_options
def ops(
    tokens: int,
    streams: int,
    channels: int,
    numerics: Any,
    rounds: int,
    eager: bool,
    allow_missing: bool,
    request: Request,
) -> None:
    """Time one connection, forward and backward, by every implementation on the device.

    \b
    mhc bench ops --dtype bfloat16 --json ops.json

    Exit status 1 if an implementation has wrong results, or a peer is missing.
    """
    from manifold_hc.bench import peers
    from manifold_hc.bench.ops import bench_ops

    problems = request.problems(tokens, streams, channels, numerics=numerics)
    if not allow_missing:
        wanted = [peer for problem in problems for peer in peers.for_problem(problem)]
        request.require(missing=[peer.package for peer in wanted if peer.version is None])
    with request.progress() as progress:
        found = [bench_ops(problem, rounds, eager, progress) for problem in problems]
    request.show(found)
    rows = [row for result in found for row in result.rows]
    missing = [row.implementation for row in rows if row.state == "missing"]
    wrong = [row.implementation for row in rows if row.state == "wrong"]
    request.require(wrong, [] if allow_missing else missing)


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
@request_options
def step(name: str, tokens: int, rounds: int, allow_missing: bool, request: Request) -> None:
    """Time the parts of a training step one by one, and sum to full depth the time mHC adds.

    \b
    mhc bench step --preset 3b --dtype float32 --rounds 7

    A dense block and two blocks with experts are built, one after the other; the preset 3b needs
    about 12 GB of memory and some minutes.
    """
    from manifold_hc.bench import peers
    from manifold_hc.bench.step import PEER, bench_step
    from manifold_hc.training import preset

    config = preset(name)
    if not allow_missing:
        known = {peer.package: peer for peer in peers.PEERS}
        request.require(missing=[] if known[PEER].version else [PEER])
    problems = request.problems(tokens, config.connection.streams, config.model.channels)
    with request.progress() as progress:
        found = [bench_step(name, config, problem, rounds, progress) for problem in problems]
    request.show(found)
    missing = [kind for result in found for kind in result.missing]
    request.require(missing=[] if allow_missing else missing)


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
@request_options
def memory(
    sublayers: int,
    tokens: int,
    streams: int,
    channels: int,
    lengths: tuple[int, ...],
    single_pass: bool,
    norms: Any,
    rounds: int,
    request: Request,
) -> None:
    """Count the bytes a stack holds for backward, by recompute block length, and time recompute.

    \b
    mhc bench memory --sublayers 24 --channels 256 --recompute 3 --recompute 8

    Without recompute the default sizes need about 8 GB in float32.
    """
    from manifold_hc.bench.stacks import bench_stacks

    if wrong := [length for length in lengths if length > sublayers]:
        raise ConfigError(
            f"recompute: a block must have 1 to {sublayers} sublayers but has {wrong[0]}"
        )
    tried = lengths or [length for length in LENGTHS if length <= sublayers]
    with request.progress() as progress:
        found = [
            bench_stacks(problem, sublayers, tried, single_pass, norms, rounds, progress)
            for problem in request.problems(tokens, streams, channels)
        ]
    request.show(found)


@bench.command()
@_count("--layers", 2, "Layers of the model, two connections each.")
@size_options
@_count("--rounds", 10, "Samples of both implementations.")
@request_options
def transformers(
    layers: int, tokens: int, streams: int, channels: int, rounds: int, request: Request
) -> None:
    """Time the connections of a DeepSeek-V4 model of transformers, plain and accelerated.

    \b
    mhc bench transformers --channels 1280 --tokens 2048 --json transformers.json

    Forward and backward of the connections and the head; the branches return their input. Exit
    status 1 if results are wrong, and then nothing is timed.
    """
    from manifold_hc.bench.accelerated import bench_accelerated

    with request.progress() as progress:
        found = [
            bench_accelerated(problem, layers, rounds, progress)
            for problem in request.problems(tokens, streams, channels, numerics="deepseek_v4")
        ]
    request.show(found)
    request.require(wrong=[name for result in found for name in result.wrong])


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
