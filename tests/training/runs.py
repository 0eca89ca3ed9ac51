"""Small runs for the tests of the trainer."""

import json
import logging
import multiprocessing
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np

from manifold_hc.data import Corpus
from manifold_hc.data.tokens import ArraySegment, Tokens
from manifold_hc.diagnostics import GainMonitor
from manifold_hc.models import ExpertsConfig
from manifold_hc.training import CheckpointConfig, Checkpoints, RunConfig, RunFolder, train
from tests import golden
from tests.conftest import generated_text


def text(documents: int = 1) -> Corpus:
    """The text of the golden run, split into equal documents."""
    ids = np.frombuffer(generated_text(40_000).encode(), dtype=np.uint8)
    starts = np.arange(documents) * (len(ids) // documents)
    return Corpus([Tokens([ArraySegment(ids, starts)])], 256)


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


def train_or_resume(
    config: RunConfig, corpus: Corpus, folder: Path, observers=(GainMonitor,)
) -> None:
    """Start the run in `folder`, or resume it from its last checkpoint."""
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
    """Observer that calls `do(model)` at one step, counted from 0; needs `probe_every=1`."""

    name = "at"
    shown: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, step: int, do) -> None:
        self.step, self.do, self.calls = step, do, 0

    def __call__(self, model):
        self.calls += 1
        if self.calls == self.step + 1:
            self.do(model)
        return {}


def at_step(step: int, do):
    """Return an observer factory that calls `do(model)` at one step."""
    return lambda probe: At(step, do)


def forkserver() -> ForkServerContext:
    """Multiprocessing context whose processes have torch imported and share no state."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.runs"])
    return context


def in_process(body: Callable[..., Any], *arguments: object) -> tuple[Any, list[str]]:
    """Run `body` in its own process; return its result or error message, and its log messages."""
    here, there = forkserver().Pipe()
    child = forkserver().Process(target=_tell, args=(there, body, arguments))
    child.start()
    there.close()
    answer, messages = here.recv()
    child.join()
    return answer, messages


def _tell(pipe: Connection, body: Callable[..., Any], arguments: tuple) -> None:
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("manifold_hc").addHandler(handler)
    try:
        answer = body(*arguments)
    except Exception as error:
        answer = f"{type(error).__name__}: {error}"
    pipe.send((answer, messages))
