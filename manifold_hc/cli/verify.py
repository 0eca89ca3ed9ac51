"""`mhc verify`."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec
from click.core import ParameterSource
from rich.markup import escape
from rich.table import Table

from manifold_hc.cli.options import device_option, float64_device, json_option
from manifold_hc.cli.terminal import console
from manifold_hc.errors import ManifoldError
from manifold_hc.files import write_atomically

if TYPE_CHECKING:
    from manifold_hc.verify import Line


@click.command()
@click.argument("hyperparameters", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Check the connections of this model instead.",
)
@click.option(
    "--layout", metavar="LAYOUT", help="Layout of PATH.  [default: by its tensors' names]"
)
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    metavar="OTHER",
    help="Second checkpoint, of any layout, that should be the same model.",
)
@click.option("--against-layout", metavar="LAYOUT", help="Layout of OTHER.")
@click.option(
    "--recorded",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Tensors recorded from your own implementation, in safetensors.",
)
@click.option(
    "--tokens", type=click.IntRange(1, 4096), default=16, show_default=True, help="Random tokens."
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the tokens."
)
@click.option("--peers", is_flag=True, help="Compare the libraries that have mHC instead.")
@click.option(
    "--markdown",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="With --peers: write the page there.",
)
@device_option
@json_option
@click.pass_context
def verify(
    context: click.Context,
    hyperparameters: tuple[str, ...],
    checkpoint: Path | None,
    layout: str | None,
    against: Path | None,
    against_layout: str | None,
    recorded: Path | None,
    tokens: int,
    seed: int,
    peers: bool,
    markdown: Path | None,
    device: str,
    json_file: Path | None,
) -> None:
    """Check every operator on every backend, and every peer, against float64 on your device.

    \b
    mhc verify
    mhc verify --device cuda --json verify.json
    mhc verify --checkpoint model.safetensors
    mhc verify --checkpoint model/ --recorded mine.safetensors
    mhc verify --checkpoint model/ --against converted.safetensors
    mhc verify --peers --markdown agreement.md

    Compares outputs and all gradients, at usual and odd sizes; every tensor has the tolerance of
    its dtype. "not served": the backend does not support the call; the last lines count the skipped
    checks with their reasons. Exit status 1 if any check fails.

    With --checkpoint it compares our forward pass with the reference implementation of the files'
    format, sublayer by sublayer, names the first that differs, and searches the convention that
    would fit. KEY=VALUE are hyperparameters that the files do not give, as in `mhc convert`.
    """
    _require_fitting(context, bool(checkpoint), peers)
    if checkpoint is not None:
        from manifold_hc.cli.verify_checkpoint import verify_checkpoint

        if against is not None and recorded is not None:
            raise click.UsageError("--against and --recorded exclude each other")
        verify_checkpoint(
            checkpoint,
            layout,
            hyperparameters,
            (against, against_layout),
            recorded,
            (tokens, seed),
            json_file,
        )
    elif peers:
        from manifold_hc.cli.verify_peers import verify_peers

        verify_peers(markdown, json_file)
    else:
        _verify_operators(device, json_file)


OPTIONS = {
    "--checkpoint": ("hyperparameters", "layout", "against", "recorded", "tokens", "seed"),
    "--against": ("against_layout",),
    "--peers": ("markdown",),
}
"""Options that need another one."""


def _require_fitting(context: click.Context, checkpoint: bool, peers: bool) -> None:
    """Raise UsageError for an option that has no effect without another one."""
    given = {
        name
        for name in context.params
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT
    }
    for option, names in OPTIONS.items():
        if option.strip("-") not in given and (idle := given.intersection(names)):
            named = min(idle).replace("_", "-")
            words = "KEY=VALUE needs" if named == "hyperparameters" else f"--{named} needs"
            raise click.UsageError(f"{words} {option}")
    if checkpoint and peers:
        raise click.UsageError("--checkpoint and --peers exclude each other")
    if "device" in given and (checkpoint or peers):
        raise click.UsageError("--device is for the check of the operators; leave it out")


def _verify_operators(device: str, json_file: Path | None) -> None:
    """Run all checks of operators and peers, and print them."""
    from manifold_hc.bench.output import results
    from manifold_hc.verify import Line, verify

    chosen = float64_device(device)
    lines: list[Line] = []
    with console(stderr=True).status("verify") as status:
        for line in verify(chosen, lambda text: status.update(escape(text))):
            lines.append(line)
    console().print(_table(lines))
    for line in lines:
        if line.reason and line.state != "not served":
            console().print(escape(f"{line.name}, {line.dtype}: {line.state}: {line.reason}"))
    ran = [line for line in lines if line.state in ("ok", "FAILED")]
    failed = [line for line in lines if line.state == "FAILED"]
    for summary in skipped(lines):
        console().print(escape(summary), soft_wrap=True)
    click.echo(f"{len(ran)} checks ran on {chosen}, {len(failed)} failed")
    if json_file:
        content = {"machine": results.machine(chosen), "checks": lines}
        write_atomically(json_file, msgspec.json.format(msgspec.json.encode(content)))
    if failed:
        raise ManifoldError(
            f"verify: wanted every check within its tolerance, {len(failed)} of {len(ran)} are "
            f"not, the first is {failed[0].name} by {failed[0].backend} in {failed[0].dtype}; "
            'use backend="reference" until it is repaired, and report it with `mhc info`'
        )


def skipped(lines: "list[Line]") -> list[str]:
    """Return a line for each backend or peer with skipped checks: their number and the reasons."""
    reasons: dict[str, Counter[str]] = {}
    for line in lines:
        if line.state in ("not served", "not installed"):
            name = line.backend if line.state == "not served" else line.name
            reason = line.reason.partition(f'backend "{line.backend}" ')[2] or line.reason
            reasons.setdefault(name, Counter())[reason] += 1
    return [
        f"{counts.total()} skipped, {name}: {'; '.join(counts)}" for name, counts in reasons.items()
    ]


def _table(lines: "list[Line]") -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("check", "backend", "dtype"):
        table.add_column(column)
    for column in ("largest relative error", "tolerance"):
        table.add_column(column, justify="right")
    table.add_column("state")
    for line in lines:
        failed = line.state == "FAILED"
        table.add_row(
            *map(escape, (line.name, line.backend, line.dtype)),
            "-" if line.error is None else f"{line.error:.1e}",
            "-" if line.tolerance is None else f"{line.tolerance:.0e}",
            line.state,
            style="red" if failed else None,
        )
    return table
