"""What a person sees while a run goes on: a bar in a terminal, plain lines elsewhere."""

from collections.abc import Mapping, Sequence
from contextlib import suppress

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

LINE_EVERY = 50
"""Steps between two lines where there is no terminal."""


WIDE = 170
"""Columns from which bar and figures have room side by side."""


class ProgressView:
    """Shows the newest figures of a run."""

    def __init__(self, console: Console, title: str, steps: int, done: int = 0) -> None:
        """`title` names the run; `steps` is its length, `done` of them lie behind."""
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

    def update(self, step: int, figures: Mapping[str, float]) -> None:
        """Show `figures`; `step` counts from 0."""
        texts = [f"{name} {value:.4g}" for name, value in figures.items()]
        text = "  ".join(texts)
        shown = "\n".join(lines_of(texts, self.console.width))
        self._bar.update(self._task, completed=step + 1, figures=shown)
        due = (step + 1) % LINE_EVERY == 0 or step + 1 == self.steps
        if due and not self.console.is_terminal:
            line = f"{self.title}  step {step + 1}/{self.steps}  {text}"
            with suppress(OSError):  # a log on a full disk, or a reader that has left
                self.console.print(line, soft_wrap=True, highlight=False)

    def start(self) -> None:
        """Show the bar."""
        self._bar.start()

    def stop(self) -> None:
        """Leave the last figures standing."""
        self._bar.stop()


def lines_of(texts: Sequence[str], width: int) -> list[str]:
    """The texts in lines of at most `width` columns, none of them broken."""
    lines: list[str] = []
    for text in texts:
        if lines and len(lines[-1]) + 2 + len(text) <= width:
            lines[-1] += f"  {text}"
        else:
            lines.append(text)
    return lines
