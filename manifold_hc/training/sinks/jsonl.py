"""Sink that appends records to metrics.jsonl."""

from collections.abc import Mapping
from typing import Any

from manifold_hc.training.metrics_file import MetricsFile
from manifold_hc.training.sinks.sink import Sink


class JsonlSink(Sink):
    """Appends one line per record: {"event": ..., "step": ..., figures}."""

    def __init__(self, records: MetricsFile) -> None:
        """records: metrics file of the run folder."""
        self._records = records

    def write(self, event: str, step: int, figures: Mapping[str, Any]) -> None:
        """Append a record; raise ManifoldError if the file cannot be written at all."""
        self._records.append({"event": event, "step": step, **figures})
