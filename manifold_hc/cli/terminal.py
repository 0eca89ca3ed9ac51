"""Consoles, log handler and encoding of the commands' output."""

import codecs
import io
import logging
import os
import shlex
import sys
from contextlib import suppress
from functools import cache

from rich.console import Console

from manifold_hc.parallel import is_rank0

WIDE = 130
"""Columns of the table of a comparison."""

PLAIN = {"±": "+-"}
"""Replacements of characters that an encoding lacks."""

PLAIN_WIDTH = 160
"""Columns of the output without a terminal."""


def replace_unencodable() -> None:
    """Make stdout and stderr replace characters that their encoding lacks."""
    codecs.register_error("manifold_hc", _replaced)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="manifold_hc")


def _replaced(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    if error.object[error.start] in PLAIN:
        return PLAIN[error.object[error.start]], error.start + 1
    return codecs.backslashreplace_errors(error)


def command_line() -> str:
    """Return the command line, quoted for a shell."""
    return shlex.join(["mhc", *sys.argv[1:]]).encode(errors="backslashreplace").decode()


@cache
def console(*, stderr: bool = False) -> Console:
    """Return a rich console; plain text without a terminal or with NO_COLOR set."""
    found = Console(stderr=stderr, highlight=False)
    if found.is_terminal and not os.environ.get("NO_COLOR"):
        return found
    return Console(
        stderr=stderr,
        highlight=False,
        force_terminal=False,
        width=None if found.is_terminal else PLAIN_WIDTH,
    )


class _ConsoleHandler(logging.Handler):
    """Prints through the console, so that messages appear above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):  # a log on a full disk must not stop the command
            console(stderr=True).print(self.format(record), markup=False, soft_wrap=True)


def log_to_stderr() -> None:
    """Show the library's log messages; in a distributed run, those of rank 0."""
    logger = logging.getLogger("manifold_hc")
    logger.handlers = [_ConsoleHandler()]
    # DTensor warns of how it moves shards, which a user cannot change.
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
    logger.setLevel(logging.INFO if is_rank0() else logging.CRITICAL)
