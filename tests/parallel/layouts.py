"""Distributed runs of the tests, and their layouts."""

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
    """Return degrees of parallelism as pytest parameters; `wide` ones need --wide."""

    def name(degrees):
        return " x ".join(f"{axis} {degree}" for axis, degree in degrees.items()) or "alone"

    return [pytest.param(degrees, id=name(degrees)) for degrees in narrow] + [
        pytest.param(degrees, id=name(degrees), marks=pytest.mark.wide) for degrees in wide
    ]


def distributed(config: RunConfig, **parallel) -> RunConfig:
    """Return the configuration of the same run with these degrees of parallelism."""
    degrees = ParallelConfig(**parallel)
    return replace(config, parallel=degrees)


def with_microbatches(config: RunConfig, microbatches: int) -> RunConfig:
    """Return the configuration of the same run with this number of microbatches."""
    return replace(config, training=replace(config.training, accumulate=microbatches))


def run(config: RunConfig, folder: Path, observers=(), documents: int = 1) -> dict:
    """Start the run, or resume it from its last checkpoint; return the summary."""
    corpus, there = text(documents), RunFolder(folder)
    check(config, corpus)
    with join_process_group(config.parallel, CPU) as processes:
        saved = Checkpoints(there.checkpoints, config.checkpoint, corpus.digest, processes)
        return train(config, corpus, there, observers, resume=saved.find(), processes=processes)


class ExpertChoices:
    """Observer that records the chosen experts of every token, from the second step on."""

    name = "choices"
    shown: dict[str, str] = {}  # noqa: RUF012

    def __init__(self) -> None:
        self.chosen: list[torch.Tensor] = []
        self._has_hooks = False

    def __call__(self, model: nn.Module) -> dict:
        if not self._has_hooks:
            self._has_hooks = True
            for mixture in mixtures(model).values():
                mixture.router.register_forward_hook(self._note)
        return {}

    def _note(self, module: nn.Module, arguments: tuple, result: tuple) -> None:
        if torch.is_grad_enabled():
            self.chosen.append(result[1].sort(-1).values)


def run_all(runs: list[tuple[RunConfig, Path]]) -> None:
    """Run several configurations one after the other in the same processes."""
    for config, folder in runs:
        run(config, folder)


def figures(folder: Path) -> dict[str, list[float]]:
    """Return losses, gradient norms and validation losses of a run."""
    records = RunFolder(folder).metrics()
    steps = [record for record in records if record["event"] == "step"]
    return {
        "losses": [record["loss"] for record in steps],
        "norms": [record["gradient_norm"] for record in steps],
        "validation": [r["loss"] for r in records if r["event"] == "validation"],
    }
