"""Progress of tokenization: a bar in a terminal, plain lines elsewhere."""

import time
from contextlib import suppress

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

LINE_SECONDS = 10.0
"""Seconds between two lines without a terminal."""


class ReadingProgress:
    """Context manager that shows the share of the sources' bytes that has been read."""

    def __init__(self, console: Console | None, total: int) -> None:
        """console: None for no progress; total: bytes of all files."""
        self.console = console
        self.total = total
        self.done = 0
        self._start = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if console is not None and console.is_terminal:
            self._bar = Progress(
                TextColumn("tokenizing"),
                BarColumn(bar_width=16),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(compact=True),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> "ReadingProgress":
        """Show the bar."""
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the bar."""
        if self._bar:
            self._bar.stop()

    def advance(self, count: int) -> None:
        """Add `count` bytes that have been read."""
        self.done += count
        now = time.monotonic()
        if self._bar:
            self._bar.update(self._task, completed=self.done)
        elif self.console and now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            rate = self.done / (now - self._start) / 1e6
            line = (
                f"tokenizing: {self.done / 1e6:.0f} of {self.total / 1e6:.0f} MB, {rate:.1f} MB/s"
            )
            with suppress(OSError):  # a log on a full disk, or a closed pipe
                self.console.print(line, soft_wrap=True, highlight=False)
