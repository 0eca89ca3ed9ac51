"""What a run tells while it goes on: its metrics file, TensorBoard if asked, and the screen."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rich.console import Console
from torch import Tensor, nn

from manifold_hc.errors import ConfigError
from manifold_hc.training.config import TrainingConfig
from manifold_hc.training.folder import RunFolder
from manifold_hc.training.progress import ProgressView

logger = logging.getLogger("manifold_hc")


@runtime_checkable
class Observer(Protocol):
    """Looks at the model from outside, every `training.probe_every` steps and at the end."""

    name: str
    """The event its records get in the metrics."""

    @property
    def shown(self) -> Mapping[str, str]:
        """What the progress view shows: a label, and the key of a number in the record."""

    def __call__(self, model: nn.Module) -> Mapping[str, Any]:
        """A record for the metrics, JSON-compatible; must leave the model as it is."""


ObserverFactory = Callable[[Tensor], Observer]
"""Makes an observer from the fixed probe batch [B, T] of a run."""


class Journal:
    """Takes the records of a run, from `open` to `close`."""

    def __init__(
        self,
        folder: RunFolder | None,
        config: TrainingConfig,
        observers: Sequence[Observer],
        console: Console,
        title: str,
        done: int,
    ) -> None:
        """done: steps that lie behind; what TensorBoard has from there on is replaced.

        folder: None for a process that looks on, with observers, and tells nothing.
        """
        self._folder = folder
        self._observers = observers
        self._shown: dict[str, float] = {}
        self._view = ProgressView(console, title, config.steps, done) if folder else None
        self._writer = (
            _writer(folder.path / "tensorboard", done) if folder and config.tensorboard else None
        )

    def step(self, step: int, figures: Mapping[str, float]) -> None:
        """The record of a step, counted from 0."""
        self._record("step", step, figures)
        shown = {"loss": "loss", "norm": "gradient_norm", "tokens/s": "tokens_per_second"}
        self._shown |= {label: figures[key] for label, key in shown.items()}

    def validation(self, step: int, loss: float) -> None:
        """The validation loss after a step."""
        self._record("validation", step, {"loss": loss})
        self._shown["validation"] = loss

    def experts(self, step: int, figures: Mapping[str, Any]) -> None:
        """How the step's tokens were spread over the experts."""
        self._record("experts", step, figures)
        self._shown["load"] = figures["largest_load"]

    def observe(self, step: int, model: nn.Module) -> None:
        """What the observers see in the model."""
        for observer in self._observers:
            figures = observer(model)
            self._record(observer.name, step, figures)
            self._shown |= {label: figures[key] for label, key in observer.shown.items()}

    def show(self, step: int) -> None:
        """Put the newest figures on the screen; once a step."""
        if self._view is not None:
            self._view.update(step, self._shown)

    def _record(self, event: str, step: int, figures: Mapping[str, Any]) -> None:
        if self._folder is None:
            return
        self._folder.append({"event": event, "step": step, **figures})
        if self._writer is None:
            return
        try:
            for name, value in figures.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(f"{event}/{name}", value, step)
        except OSError as failed:
            logger.error("TENSORBOARD CANNOT BE WRITTEN: %s; it gets no more", failed.strerror)
            self._writer = None

    def open(self) -> None:
        """Start the progress view."""
        if self._view is not None:
            self._view.start()

    def close(self) -> None:
        """Hand over what is held back."""
        if self._view is not None:
            self._view.stop()
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()


def require_tensorboard() -> None:
    """Raise ConfigError where TensorBoard is not installed."""
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        raise ConfigError(
            "training.tensorboard: needs tensorboard; "
            "install it with: pip install 'manifold-hc[tensorboard]'"
        ) from None


def _writer(folder: Path, first_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder, purge_step=first_step)
