"""Sinks of the metrics: metrics.jsonl, TensorBoard and the progress view."""

from rich.console import Console

from manifold_hc.parallel import Processes
from manifold_hc.training.config import TrainingConfig
from manifold_hc.training.folder import RunFolder
from manifold_hc.training.sinks.jsonl import JsonlSink
from manifold_hc.training.sinks.progress import ProgressView
from manifold_hc.training.sinks.sink import Sink
from manifold_hc.training.sinks.tensorboard import TensorBoardSink

__all__ = ["Sink", "open_sinks"]


def open_sinks(
    folder: RunFolder,
    config: TrainingConfig,
    console: Console,
    title: str,
    done: int,
    processes: Processes,
) -> list[Sink]:
    """Return the sinks of this rank: none but on rank 0. done: steps taken before this start."""
    if not processes.is_rank0:
        return []
    sinks: list[Sink] = [JsonlSink(folder.records)]
    if config.tensorboard:
        sinks.append(TensorBoardSink(folder.path / "tensorboard", done))
    return [*sinks, ProgressView(console, title, config.steps, done)]
