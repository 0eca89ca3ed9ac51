"""Where the commands print."""

import logging
import os
from functools import cache

from rich.console import Console
from rich.logging import RichHandler

WIDE = 130
"""Columns that the table of a comparison needs."""

PLAIN_WIDTH = 160
"""Columns where no terminal tells."""


@cache
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


def log_to_stderr() -> None:
    """Show the library's messages, above a progress bar where there is one."""
    handler = RichHandler(
        console=console(stderr=True), show_time=False, show_level=False, show_path=False
    )
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("manifold_hc")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
