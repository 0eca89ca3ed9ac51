"""What commands have in common: where a RunConfig comes from, where figures go."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from manifold_hc.cli.keys import describe, override, override_from
from manifold_hc.errors import DataError
from manifold_hc.training import RunConfig

json_option = click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write the figures there too.",
)


class RunCommand(click.Command):
    """A command whose --help lists the keys of a run."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One row a key, after the options."""
        rows = [(f"{key}={default}", sentence) for key, default, sentence in describe(RunConfig())]
        with formatter.section("Keys, with their defaults"):
            formatter.write_dl(rows)


def run_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add --data, --config and KEY=VALUE, and hand the command its `config`."""

    @click.option(
        "--data", metavar="FILE", help="UTF-8 text to train on; short for data.path=FILE."
    )
    @click.option(
        "--config",
        "config_file",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        metavar="FILE",
        help="Start from a run's config.json instead of the defaults.",
    )
    @click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
    @wraps(function)
    def command(
        data: str | None, config_file: Path | None, overrides: tuple[str, ...], **rest: Any
    ) -> None:
        config = override_from(RunConfig(), config_file) if config_file else RunConfig()
        if data == "":
            raise DataError("data: --data is empty; give a text file, or leave the option out")
        pairs = [*overrides, *([f"data.path={data}"] if data else [])]
        function(config=override(config, pairs), **rest)

    return command
