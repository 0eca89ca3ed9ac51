"""Sink that writes scalars for TensorBoard."""

import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from manifold_hc.errors import ConfigError
from manifold_hc.training.sinks.sink import Sink

logger = logging.getLogger("manifold_hc")


class TensorBoardSink(Sink):
    """Writes every number of a record as the scalar `event/name`."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Open a writer; events of an earlier start from `first_step` on are purged."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(folder, purge_step=first_step)

    def write(self, event: str, step: int, figures: Mapping[str, Any]) -> None:
        """Write the numbers of a record; after an error of the disk, write no more."""
        if self._writer is None:
            return
        try:
            for name, value in figures.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(f"{event}/{name}", value, step)
        except OSError as failed:
            logger.error("TENSORBOARD CANNOT BE WRITTEN: %s; it gets no more", failed.strerror)
            self._writer = None

    def close(self) -> None:
        """Flush and close the writer."""
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()


def require_tensorboard() -> None:
    """Raise ConfigError if TensorBoard is not installed."""
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        raise ConfigError(
            "training.tensorboard: needs tensorboard; "
            "install it with: pip install 'manifold-hc[tensorboard]'"
        ) from None
