"""The file metrics.jsonl: one record per line."""

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from manifold_hc.errors import ManifoldError
from manifold_hc.files import is_permanent, read_regular
from manifold_hc.training.json_files import damaged_error, is_number, unreadable_error

logger = logging.getLogger("manifold_hc")

NUMBERS = {"step": ("loss", "gradient_norm", "seconds"), "validation": ("loss",)}
"""Numbers that the trainer's own records must have, by event; observers choose their own."""


class MetricsFile:
    """Appends records to a file, and holds in memory those that a full disk does not take."""

    def __init__(self, path: Path) -> None:
        """path: of the file, which is neither created nor read yet."""
        self.path = path
        self._held = b""

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line; numbers that are not finite become null.

        Lines that a full disk does not take are held, and written with the next ones. Raises
        ManifoldError if the file cannot be written at all.
        """
        held = bool(self._held)
        self._held += msgspec.json.encode(record) + b"\n"
        try:
            self.flush()
        except OSError as error:
            if is_permanent(error):
                raise ManifoldError(
                    f"run folder: {self.path} cannot be written: {error.strerror}; "
                    "mend that and go on with --resume"
                ) from None
            if not held:
                logger.error("METRICS CANNOT BE WRITTEN, held in memory: %s", error.strerror)

    def flush(self) -> None:
        """Write the lines that are held; raise OSError, with the file unchanged, if that fails."""
        if not self._held:
            return
        before = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("ab") as file:
                file.write(self._held)
        except OSError:
            with suppress(OSError):
                os.truncate(self.path, before)
            raise
        self._held = b""

    def read(self) -> list[dict[str, Any]]:
        """Return all records; a last line cut short by a crash is left out.

        Raises RunFolderError for a line that is not a valid record.
        """
        try:
            written = read_regular(self.path) if self.path.exists() else b""
        except OSError as error:
            raise unreadable_error(self.path, error) from None
        lines = [*written.split(b"\n")[:-1], *self._held.split(b"\n")[:-1]]
        records: list[dict[str, Any]] = []
        for number, line in enumerate(lines, start=1):
            cure = f"delete line {number}"
            try:
                record = msgspec.json.decode(line, type=dict[str, Any])
            except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
                raise damaged_error(self.path, f"line {number}: {error}", cure) from None
            if problem := _problem(record):
                raise damaged_error(self.path, f"line {number} {problem}", cure)
            records.append(record)
        return records


def _problem(record: Mapping[str, Any]) -> str:
    """Reason why a JSON object is not a valid record; empty for a valid one."""
    event, step = record.get("event"), record.get("step")
    if not isinstance(event, str):
        return "has no event"
    if not isinstance(step, int) or isinstance(step, bool):
        return "has no step"
    wrong = (key for key in NUMBERS.get(event, ()) if not is_number(record.get(key, "missing")))
    return next((f"has no number as {key}" for key in wrong), "")
