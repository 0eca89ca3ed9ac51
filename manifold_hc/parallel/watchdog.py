"""Ends a run in which a process hangs, and says which one and where.

A process that hangs leaves all others waiting for it in a collective operation. Every process
counts its own progress and tells it through the store that torchrun keeps; of those that do not say
that they wait, the one that has come least far is the one that the others wait for.
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
"""Times that a process tells its progress in the time that it may stand still."""

MOST = 5.0
"""Seconds between two of them at most."""

WAITING = ", waiting for the others"

STATUS = 70
"""Exit status of a process that ends a run that hangs."""


@dataclass(frozen=True)
class Progress:
    """How far a process has come."""

    count: int
    """Operations begun."""
    operation: str
    """The last one."""
    told: float
    """When it said so, seconds since 1970."""


class Watchdog:
    """Watches the progress of all processes in a thread of its own."""

    def __init__(self, store: Store, rank: int, size: int, timeout: float) -> None:
        """timeout: seconds that an operation may take."""
        self._store: Store = cast(Any, store).clone()  # the stubs do not know it
        self._store.set_timeout(timedelta(seconds=min(timeout, 10.0)))
        self._rank, self._size, self._timeout = rank, size, timeout
        self._progress = Progress(0, "start", time.time())
        self._since = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def at(self, operation: str) -> None:
        """Begin an operation, as every other process does, in the same order."""
        self._progress = Progress(self._progress.count + 1, operation, time.time())
        self._since = time.monotonic()

    def waits(self) -> None:
        """Have done the own part of the operation, and wait for what the others have."""
        operation = self._progress.operation.removesuffix(WAITING) + WAITING
        self._progress = Progress(self._progress.count + 1, operation, time.time())

    def goes_on(self) -> None:
        """Have what the others have done, and go on with the operation."""
        if self._progress.operation.endswith(WAITING):
            self.at(self._progress.operation.removesuffix(WAITING))

    def end(self) -> None:
        """Watch no longer."""
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        answered = time.monotonic()
        while not self._ended.wait(min(self._timeout / BEATS, MOST)):
            stands = time.monotonic() - self._since > self._timeout
            try:
                told = replace(self._progress, told=time.time())
                self._store.set(_key(self._rank), json.dumps(asdict(told)))
                found = self._all() if stands else []
                answered = time.monotonic()
            except (DistError, RuntimeError):
                found = []
            if stands:
                self._give_up(found)
            if time.monotonic() - answered > self._timeout:
                logger.critical("TORCHRUN IS GONE: the run is saved and ends")
                os.kill(os.getpid(), signal.SIGTERM)
                return

    def _all(self) -> list[Progress | None]:
        keys = [_key(rank) for rank in range(self._size)]
        return [
            Progress(**json.loads(self._store.get(key))) if self._store.check([key]) else None
            for key in keys
        ]

    def _give_up(self, found: list[Progress | None]) -> None:
        if len(found) < self._size:
            what = f"the store does not answer; rank {self._rank} is at {self._progress.operation}"
        else:
            what = describe(found)
        logger.critical("A PROCESS HANGS, nothing has moved for %.0f s: %s", self._timeout, what)
        os._exit(STATUS)


def describe(found: list[Progress | None]) -> str:
    """Which of the processes are behind, and where: those that the others wait for.

    Stages of a pipeline are not equally far at any time; but those that wait say so.
    """
    busy = [p for p in found if p is None or not p.operation.endswith(WAITING)] or found
    least = min(progress.count if progress else -1 for progress in busy)
    now = max(progress.told for progress in found if progress)
    behind = []
    for rank, progress in enumerate(found):
        if progress is None:
            behind.append(f"rank {rank} has not begun")
        elif progress.count == least and progress in busy:
            behind.append(
                f"rank {rank} is behind at {progress.operation!r}, last heard of "
                f"{now - progress.told:.0f} s ago"
            )
    return "; ".join(behind)


def _key(rank: int) -> str:
    return f"progress/{rank}"
