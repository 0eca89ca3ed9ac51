"""Watchdog: ends a run in which a rank hangs, and names the rank and its operation.

A rank that hangs leaves all others waiting in a collective. Every rank counts its operations and
publishes the count in torchrun's store; of the ranks that do not report themselves as waiting, the
one with the lowest count is the one that the others wait for.
"""

import json
import logging
import os
import signal
import threading
import time
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any, cast

from torch.distributed import DistError
from torch.distributed.distributed_c10d import Store

logger = logging.getLogger("manifold_hc")

BEATS = 10
"""Number of times that a rank publishes its progress within the timeout."""

LONGEST_BEAT = 5.0
"""Largest interval between two publications, in seconds."""

WAITING = ", waiting for the others"

STATUS = 70
"""Exit status of a process that ends a hanging run."""


@dataclass(frozen=True)
class Progress:
    """Progress of one rank."""

    count: int
    """Number of operations begun."""
    operation: str
    """Name of the last operation."""
    published: float
    """Time of publication, in seconds since 1970."""


class Watchdog:
    """Thread that publishes this rank's progress and watches for a timeout."""

    def __init__(self, store: Store, rank: int, size: int, timeout: float) -> None:
        """timeout: longest duration of an operation, in seconds."""
        # A client of its own: the main thread may block inside a call of the shared one.
        self._store: Store = cast(Any, store).clone()  # missing in the type stubs
        self._store.set_timeout(timedelta(seconds=min(timeout, 10.0)))
        self._rank, self._size, self._timeout = rank, size, timeout
        self._progress = Progress(0, "start", time.time())
        self._since = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def begin(self, operation: str) -> None:
        """Count an operation, which all ranks begin in the same order; restart the timeout."""
        self._progress = Progress(self._progress.count + 1, operation, time.time())
        self._since = time.monotonic()

    def mark_waiting(self) -> None:
        """Mark this rank as waiting for results of others; the timeout keeps running."""
        operation = self._progress.operation.removesuffix(WAITING) + WAITING
        self._progress = Progress(self._progress.count + 1, operation, time.time())

    def mark_busy(self) -> None:
        """Resume the operation after waiting; restart the timeout."""
        if self._progress.operation.endswith(WAITING):
            self.begin(self._progress.operation.removesuffix(WAITING))

    def end(self) -> None:
        """Stop the thread."""
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        answered = time.monotonic()
        while not self._ended.wait(min(self._timeout / BEATS, LONGEST_BEAT)):
            timed_out = time.monotonic() - self._since > self._timeout
            try:
                own = replace(self._progress, published=time.time())
                self._store.set(_key(self._rank), json.dumps(asdict(own)))
                progress = self._read_all() if timed_out else []
                answered = time.monotonic()
            except (DistError, RuntimeError):
                progress = []
            if timed_out:
                self._abort(progress)
            # A store without an answer means that torchrun, which serves it, has died.
            if time.monotonic() - answered > self._timeout:
                logger.critical("TORCHRUN IS GONE: the run is saved and ends")
                os.kill(os.getpid(), signal.SIGTERM)
                return

    def _read_all(self) -> list[Progress | None]:
        keys = [_key(rank) for rank in range(self._size)]
        return [
            Progress(**json.loads(self._store.get(key))) if self._store.check([key]) else None
            for key in keys
        ]

    def _abort(self, progress: list[Progress | None]) -> None:
        if len(progress) < self._size:
            operation = self._progress.operation
            cause = f"the store does not answer; rank {self._rank} is at {operation}"
        else:
            cause = describe(progress)
        logger.critical("A PROCESS HANGS, nothing has moved for %.0f s: %s", self._timeout, cause)
        # The main thread is blocked in a collective and cannot raise an error.
        os._exit(STATUS)


def describe(progress: list[Progress | None]) -> str:
    """Name the ranks that the others wait for, and their operations.

    progress: by rank; None for a rank that has published none.
    """
    # Counts differ between pipeline stages, so compare only ranks not marked as waiting.
    busy = [p for p in progress if p is None or not p.operation.endswith(WAITING)] or progress
    least = min(one.count if one else -1 for one in busy)
    now = max(one.published for one in progress if one)
    behind = []
    for rank, one in enumerate(progress):
        if one is None:
            behind.append(f"rank {rank} has not begun")
        elif one.count == least and one in busy:
            behind.append(
                f"rank {rank} is behind at {one.operation!r}, last heard of "
                f"{now - one.published:.0f} s ago"
            )
    return "; ".join(behind)


def _key(rank: int) -> str:
    return f"progress/{rank}"
