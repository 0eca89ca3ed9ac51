"""What the processes of a test do together."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from manifold_hc.models.experts import mixtures
from manifold_hc.parallel import ParallelConfig, join_process_group
from manifold_hc.training import Checkpoints, RunConfig, RunFolder, check, train
from tests.training.runs import text

CPU = torch.device("cpu")


def layouts(narrow: list[dict[str, int]], wide: list[dict[str, int]]) -> list:
    """As pytest's parameters, by their degrees; the wide ones are tested with --wide."""

    def name(degrees):
        return " x ".join(f"{axis} {degree}" for axis, degree in degrees.items()) or "alone"

    return [pytest.param(degrees, id=name(degrees)) for degrees in narrow] + [
        pytest.param(degrees, id=name(degrees), marks=pytest.mark.wide) for degrees in wide
    ]


def shared(config: RunConfig, **parallel) -> RunConfig:
    """The same run, its batch cut into as many pieces as processes share it."""
    degrees = ParallelConfig(**parallel)
    return replace(config, parallel=degrees)


def in_pieces(config: RunConfig, pieces: int) -> RunConfig:
    """The same run in one process, its batch cut into so many pieces."""
    return replace(config, training=replace(config.training, accumulate=pieces))


def run(config: RunConfig, folder: Path, observers=(), documents: int = 1) -> dict:
    """Start the run, or go on from its last checkpoint; returns the summary."""
    corpus, there = text(documents), RunFolder(folder)
    check(config, corpus)
    with join_process_group(config.parallel, CPU) as processes:
        saved = Checkpoints(there.checkpoints, config.checkpoint, corpus.digest, processes)
        return train(config, corpus, there, observers, resume=saved.find(), processes=processes)


class Choices:
    """An observer that remembers which experts every token visits, from the second step on."""

    name = "choices"
    shown: dict[str, str] = {}  # noqa: RUF012

    def __init__(self) -> None:
        self.made: list[torch.Tensor] = []
        self._looks = False

    def __call__(self, model: nn.Module) -> dict:
        if not self._looks:
            self._looks = True
            for mixture in mixtures(model).values():
                mixture.router.register_forward_hook(self._note)
        return {}

    def _note(self, module: nn.Module, arguments: tuple, result: tuple) -> None:
        if torch.is_grad_enabled():
            self.made.append(result[1].sort(-1).values)


def run_all(runs: list[tuple[RunConfig, Path]]) -> None:
    """One after the other, in the same processes."""
    for config, folder in runs:
        run(config, folder)


def figures(folder: Path) -> dict[str, list[float]]:
    """Losses and norms by what they are of."""
    records = RunFolder(folder).metrics()
    steps = [record for record in records if record["event"] == "step"]
    return {
        "losses": [record["loss"] for record in steps],
        "norms": [record["gradient_norm"] for record in steps],
        "validation": [r["loss"] for r in records if r["event"] == "validation"],
    }
