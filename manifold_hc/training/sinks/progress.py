"""Sink that shows progress: a bar in a terminal, plain lines elsewhere."""

from collections.abc import Mapping, Sequence
from contextlib import suppress

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

from manifold_hc.training.sinks.sink import Sink

LINE_EVERY = 50
"""Steps between two lines without a terminal."""


WIDE = 170
"""Terminal width from which bar and figures fit on one line, in columns."""


class ProgressView(Sink):
    """Shows the newest figures of a run."""

    def __init__(self, console: Console, title: str, steps: int, done: int = 0) -> None:
        """title: name of the run. steps: its length. done: steps taken before this start."""
        self.console = console
        self.title = title
        self.steps = steps
        count = "{task.description}  {task.completed}/{task.total}"
        columns: tuple[ProgressColumn, ...] = (
            BarColumn(bar_width=16),
            TextColumn(count + "  {task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
        )
        if console.width < WIDE:
            columns = (TextColumn(count + "\n{task.fields[figures]}"),)
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task(title, total=steps, completed=done, figures="")

    def open(self) -> None:
        """Show the bar."""
        self._bar.start()

    def end_step(self, step: int, shown: Mapping[str, float]) -> None:
        """Show figures by label; `step` counts from 0."""
        texts = [f"{name} {value:.4g}" for name, value in shown.items()]
        lines = "\n".join(wrap_texts(texts, self.console.width))
        self._bar.update(self._task, completed=step + 1, figures=lines)
        due = (step + 1) % LINE_EVERY == 0 or step + 1 == self.steps
        if due and not self.console.is_terminal:
            line = f"{self.title}  step {step + 1}/{self.steps}  {'  '.join(texts)}"
            with suppress(OSError):  # a log on a full disk, or a reader that has left
                self.console.print(line, soft_wrap=True, highlight=False)

    def close(self) -> None:
        """Stop the bar; the last figures stay on the screen."""
        self._bar.stop()


def wrap_texts(texts: Sequence[str], width: int) -> list[str]:
    """Join texts into lines of at most `width` columns; no text is broken."""
    lines: list[str] = []
    for text in texts:
        if lines and len(lines[-1]) + 2 + len(text) <= width:
            lines[-1] += f"  {text}"
        else:
            lines.append(text)
    return lines
