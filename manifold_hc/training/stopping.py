"""Ctrl-C and SIGTERM as a request that the loop answers between two steps."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether somebody has asked the run to stop, and how."""

    def __init__(self) -> None:
        """Nobody has."""
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, signal._HANDLER] = {}

    def listen(self) -> None:
        """Hold back the first signal; a second one has its usual effect.

        Under torchrun a second SIGTERM has none: it sends one to whom a cluster has sent one.
        """
        self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}

    def end(self) -> None:
        """Give signals their usual effect again."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _ask(self, number: int, _: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self.end()
        if self.signal == signal.SIGTERM and "TORCHELASTIC_RUN_ID" in os.environ:
            self._before = {self.signal: signal.signal(self.signal, signal.SIG_IGN)}


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Listen for signals; in the main thread alone, for Python has none elsewhere."""
    request = StopRequest()
    if threading.current_thread() is threading.main_thread():
        request.listen()
    try:
        yield request
    finally:
        request.end()
