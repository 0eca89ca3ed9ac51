"""Stop requests: Ctrl-C and SIGTERM, handled by the training loop between two steps."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Signal that asks the run to stop, if one has arrived."""

    def __init__(self) -> None:
        """Start without a request and without handlers."""
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, signal._HANDLER] = {}

    def listen(self) -> None:
        """Record the first signal; a second one has its usual effect.

        Under torchrun a second SIGTERM is ignored: torchrun forwards the one of the cluster to
        processes that have received it already.
        """
        self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}

    def end(self) -> None:
        """Restore the previous signal handlers."""
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
    """Listen for signals; only in the main thread, where Python delivers them."""
    request = StopRequest()
    if threading.current_thread() is threading.main_thread():
        request.listen()
    try:
        yield request
    finally:
        request.end()
