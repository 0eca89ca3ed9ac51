"""Where the commands print."""

import os

from rich.console import Console

PLAIN_WIDTH = 160
"""Columns where no terminal tells: wide enough for every table."""


def console(*, stderr: bool = False) -> Console:
    """A rich console; plain text without a terminal or with NO_COLOR set."""
    found = Console(stderr=stderr, highlight=False)
    if found.is_terminal and not os.environ.get("NO_COLOR"):
        return found
    return Console(
        stderr=stderr,
        highlight=False,
        force_terminal=False,
        width=None if found.is_terminal else PLAIN_WIDTH,
    )
