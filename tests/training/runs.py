"""Small runs that the tests of the trainer share."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from manifold_hc.data import Corpus
from manifold_hc.data.tokens import ArrayPart, Tokens
from manifold_hc.diagnostics import GainMonitor
from manifold_hc.models import ExpertsConfig
from manifold_hc.training import CheckpointConfig, Checkpoints, RunConfig, RunFolder, train
from tests import golden
from tests.conftest import generated_text


def text(documents: int = 1) -> Corpus:
    """The golden run's text, cut into so many documents."""
    ids = np.frombuffer(generated_text(40_000).encode(), dtype=np.uint8)
    starts = np.arange(documents) * (len(ids) // documents)
    return Corpus([Tokens([ArrayPart(ids, starts)])], 256)


def config(kind: str = "mhc", checkpoint: CheckpointConfig | None = None, **training) -> RunConfig:
    """The golden run with other keys of `training`."""
    base = golden.config(kind)
    return replace(
        base,
        training=replace(base.training, **training),
        checkpoint=checkpoint or CheckpointConfig(),
    )


def with_experts(config: RunConfig) -> RunConfig:
    experts = ExpertsConfig(routed=4, active=2, width=32, balancing=0.01)
    return replace(config, model=replace(config.model, experts=experts))


def go_on(config: RunConfig, corpus: Corpus, folder: Path, observers=(GainMonitor,)) -> None:
    """Start the run in `folder`, or go on from its last checkpoint."""
    run = RunFolder(folder)
    at = Checkpoints(run.checkpoints, config.checkpoint, corpus.digest).find()
    train(config, corpus, run, observers, resume=at)


def figures(folder: Path) -> list[dict]:
    """All records but for the times in them."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [
        {k: v for k, v in record.items() if k not in ("seconds", "tokens_per_second")}
        for record in records
    ]


class At:
    """An observer that does something at one step, counted from 0; with `probe_every=1`."""

    name = "at"
    shown: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, step: int, do) -> None:
        self.step, self.do, self.calls = step, do, 0

    def __call__(self, model):
        self.calls += 1
        if self.calls == self.step + 1:
            self.do(model)
        return {}


def at(step: int, do):
    """The factory of such an observer."""
    return lambda probe: At(step, do)
