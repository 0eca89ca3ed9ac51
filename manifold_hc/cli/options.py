"""Options that commands share: the configuration of a run, the device, the JSON file."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Any

import click

from manifold_hc.cli.keys import describe, override, override_from, suggestion
from manifold_hc.config import ConnectionConfig
from manifold_hc.errors import ConfigError, DataError
from manifold_hc.training import PRESETS, RunConfig, find_weights, preset
from manifold_hc.training.weight_source import WeightSource

json_option = click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write the figures there too.",
)

device_option = click.option(
    "--device",
    type=click.Choice(("auto", "cpu", "cuda")),
    default="auto",
    show_default=True,
    help="Where to run; auto takes a GPU if there is one.",
)


init_option = click.option(
    "--init",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Start from the weights of this run, checkpoint or exported model, with its sizes, "
    "connections and tokenizer.",
)

drop_option = click.option(
    "--drop-connections",
    is_flag=True,
    help="With --init: start with new connections in place of the given ones.",
)


def float64_device(name: str) -> str:
    """Return the device `name`; "auto" skips MPS, which has no float64 for the reference."""
    from manifold_hc.training.device import find_device

    found = find_device(name).type
    return "cpu" if found == "mps" else found


WITHOUT_EFFECT = {
    "residual": {field.name for field in fields(ConnectionConfig)} - {"kind", "backend"},
    "hc": {"constraint", "iterations", "numerics", "hc_eps"},
}
"""Keys of `connection` that a kind does not use."""


def require_effect(keys: Iterable[str], kinds: Sequence[str]) -> None:
    """Raise ConfigError for a key of `connection` that none of the `kinds` uses."""
    for key in keys:
        if all(key in WITHOUT_EFFECT.get(kind, ()) for kind in kinds):
            raise ConfigError(
                f"connection.{key}: has no effect with connection.kind={' or '.join(kinds)}; "
                "leave it out"
            )


class Group(click.Group):
    """A group that prints its help and exits with status 2 if no command is given."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments, or print the help if there are none."""
        if not args:
            click.echo(ctx.get_help(), err=True)
            ctx.exit(2)
        return super().parse_args(ctx, args)


class RunCommand(click.Command):
    """A command with key=value arguments, which its --help lists."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments; the error for a key typed as an option has a hint."""
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            raise click.UsageError(_no_option(error, given), ctx) from None

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Add one row for each key after the options."""
        rows = [(f"{key}={default}", sentence) for key, default, sentence in describe(RunConfig())]
        with formatter.section("Keys, with their defaults"):
            formatter.write_dl(rows)


def _no_option(error: click.NoSuchOption, given: Sequence[str]) -> str:
    """Return the message for an unknown option: a key's hint, or click's own suggestion."""
    key = error.option_name.lstrip("-")
    word = next((word for word in given if word.partition("=")[0] == error.option_name), "")
    value = word.partition("=")[2] or next(iter(given[given.index(word) + 1 :] if word else ()), "")
    hint = suggestion(RunConfig(), key, value)
    is_key = "." in key or hint.rpartition("=")[0].endswith(f".{key.replace('-', '_')}")
    if error.possibilities and not is_key:
        return error.format_message()
    hint = hint or "keys of the configuration are given as key=value, see --help"
    return f"No such option {error.option_name!r}; {hint}"


@dataclass(frozen=True)
class Wanted:
    """Configuration options of a command line."""

    preset: str | None
    config_file: Path | None
    data: tuple[str, ...]
    overrides: tuple[str, ...]

    def config(self, base: RunConfig | None = None, kinds: Sequence[str] = ()) -> RunConfig:
        """Build the configuration: KEY=VALUE wins over --data, over the file, over the preset.

        base: configuration to change, in place of a preset. kinds: of the connections that will be
        trained, default the configuration's own; a KEY=VALUE that none of them uses is an error.
        A file may have such keys, because a run writes all of them.
        """
        config = base or (preset(self.preset) if self.preset else RunConfig())
        if self.config_file:
            config = override_from(config, self.config_file)
        if "" in self.data:
            raise DataError("data: --data is empty; give a text, or leave the option out")
        data = {"data.paths": self.data} if self.data else {}
        config = override(config, self.overrides, data)
        keys = [pair.partition("=")[0] for pair in self.overrides]
        own = [key.removeprefix("connection.") for key in keys if key.startswith("connection.")]
        require_effect(own, kinds or [config.connection.kind])
        return config


def initial_source(wanted: Wanted, init: Path | None, step: int | None) -> WeightSource | None:
    """Find the weights of --init; ConfigError with --preset, which has sizes of its own."""
    if init is None:
        return None
    if wanted.preset:
        raise ConfigError("--init: brings the sizes of the model; leave --preset out")
    return find_weights(init, step)


def require_init(init: Path | None, *, drop_connections: bool) -> None:
    """Raise ConfigError for --drop-connections without --init."""
    if drop_connections and init is None:
        raise ConfigError("--drop-connections: belongs to --init; give the weights with it")


def run_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add --preset, --config, --data and KEY=VALUE; the command gets them as `wanted`."""

    @click.option(
        "--preset",
        metavar="NAME",
        help=f"Start from one of {', '.join(PRESETS)}.  [default: tiny]",
    )
    @click.option(
        "--config",
        "config_file",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        metavar="FILE",
        help="Start from a run's config.json; it wins over --preset.",
    )
    @click.option(
        "--data",
        multiple=True,
        metavar="PATH",
        help="Text, .jsonl, .parquet, a folder of them, or shards; short for data.paths. "
        "Give it once for every source.",
    )
    @click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
    @wraps(function)
    def command(
        preset: str | None,
        config_file: Path | None,
        data: tuple[str, ...],
        overrides: tuple[str, ...],
        **rest: Any,
    ) -> None:
        function(wanted=Wanted(preset, config_file, data, overrides), **rest)

    return command
