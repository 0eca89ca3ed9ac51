"""The command line `mhc`: its commands, errors and exit statuses."""

import os
import sys
from collections.abc import Sequence

import click
import torch

import manifold_hc
from manifold_hc.cli.bench import bench
from manifold_hc.cli.compare import compare
from manifold_hc.cli.convert import convert
from manifold_hc.cli.generate import generate
from manifold_hc.cli.info import info
from manifold_hc.cli.options import Group
from manifold_hc.cli.report import report
from manifold_hc.cli.terminal import log_to_stderr, replace_unencodable
from manifold_hc.cli.tokenize import tokenize
from manifold_hc.cli.train import train
from manifold_hc.cli.verify import verify
from manifold_hc.errors import (
    BackendError,
    CheckpointError,
    ConfigError,
    DataError,
    ManifoldError,
    RunFolderError,
    StoppedError,
)
from manifold_hc.parallel import is_rank0


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(manifold_hc.__version__, prog_name="mhc", message="%(prog)s %(version)s")
def commands() -> None:
    """Manifold-constrained hyper-connections: train variants and compare their stability.

    \b
    mhc compare            residual, HC and mHC on Python's own documentation
    mhc COMMAND --help     options and configuration keys of a command
    """


for command in (train, generate, compare, bench, verify, convert, tokenize, report, info):
    commands.add_command(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line: exit status 0, 2 for invalid input, 1 for a failed run."""
    replace_unencodable()
    log_to_stderr()
    try:
        status = commands.main(args=arguments, prog_name="mhc", standalone_mode=False)
    except click.Abort:
        _fail("stopped", 130)
    except click.ClickException as error:
        _fail(error.format_message(), 2)
    except (ConfigError, DataError, RunFolderError, CheckpointError, BackendError) as error:
        _fail(str(error), 2)
    except StoppedError as error:
        _fail(_with_notes(error), 128 + error.signal)
    except ManifoldError as error:
        _fail(_with_notes(error), 1)
    except (RuntimeError, MemoryError) as error:
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and "allocate memory" not in str(error):
            raise
        _fail("not enough memory for this configuration; make model or batch smaller", 1)
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), 1)
    else:
        if status:
            sys.exit(status)


def _with_notes(error: ManifoldError) -> str:
    return "; ".join([str(error), *getattr(error, "__notes__", [])])


def _fail(message: str, status: int) -> None:
    line = " ".join(message.split()).encode(errors="backslashreplace").decode()
    prefix = "mhc" if is_rank0() else f"mhc, process {os.environ['RANK']}"
    print(f"{prefix}: error: {line}", file=sys.stderr)
    sys.exit(status)
