"""Interface of the sinks."""

from collections.abc import Mapping
from typing import Any


class Sink:
    """Destination of a run's records; every method does nothing by default."""

    def open(self) -> None:
        """Begin a run."""

    def write(self, event: str, step: int, figures: Mapping[str, Any]) -> None:
        """Take one record; `step` counts from 0."""

    def end_step(self, step: int, shown: Mapping[str, float]) -> None:
        """Take the newest figures by label, at the end of a step."""

    def close(self) -> None:
        """End the run and release resources."""
