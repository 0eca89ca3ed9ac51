"""Metrics of a run: records of steps, validations and observers, written to sinks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from manifold_hc.training.sinks import Sink


@runtime_checkable
class Observer(Protocol):
    """Measures the model from outside, every `training.probe_every` steps and at the end."""

    name: str
    """Event name of its records in the metrics."""

    @property
    def shown(self) -> Mapping[str, str]:
        """Numbers for the progress view: label -> key of the record."""

    def __call__(self, model: nn.Module) -> Mapping[str, Any]:
        """Return a JSON-compatible record; leave the model unchanged."""


ObserverFactory = Callable[[Tensor], Observer]
"""Makes an observer from the fixed probe batch [B, T] of a run."""


class Metrics:
    """Context of a run that passes its records to sinks."""

    def __init__(self, sinks: Sequence[Sink], observers: Sequence[Observer]) -> None:
        """sinks: empty on all ranks but rank 0. observers: the same on every rank."""
        self._sinks = sinks
        self._observers = observers
        self._shown: dict[str, float] = {}

    def __enter__(self) -> "Metrics":
        """Open the sinks."""
        for sink in self._sinks:
            sink.open()
        return self

    def __exit__(self, *_: object) -> None:
        """Close the sinks."""
        for sink in self._sinks:
            sink.close()

    def step(self, step: int, figures: Mapping[str, float]) -> None:
        """Record a training step, counted from 0."""
        self._record("step", step, figures)
        shown = {"loss": "loss", "norm": "gradient_norm", "tokens/s": "tokens_per_second"}
        self._shown |= {label: figures[key] for label, key in shown.items()}

    def validation(self, step: int, loss: float) -> None:
        """Record the validation loss after a step."""
        self._record("validation", step, {"loss": loss})
        self._shown["validation"] = loss

    def experts(self, step: int, figures: Mapping[str, Any]) -> None:
        """Record the load of the experts in a step."""
        self._record("experts", step, figures)
        self._shown["load"] = figures["largest_load"]

    def observe(self, step: int, model: nn.Module) -> None:
        """Call the observers and record their figures."""
        for observer in self._observers:
            figures = observer(model)
            self._record(observer.name, step, figures)
            self._shown |= {label: figures[key] for label, key in observer.shown.items()}

    def end_step(self, step: int) -> None:
        """Show the newest figures; call it once per step."""
        for sink in self._sinks:
            sink.end_step(step, self._shown)

    def _record(self, event: str, step: int, figures: Mapping[str, Any]) -> None:
        for sink in self._sinks:
            sink.write(event, step, figures)
