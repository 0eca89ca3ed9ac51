"""`mhc bench step`: what mHC adds to a training step, from the step's parts."""

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median, quantiles

import torch

from manifold_hc.bench import parts
from manifold_hc.bench.measure.timing import Run, Sample, alternate, timed
from manifold_hc.bench.problem import Problem
from manifold_hc.bench.task import Task
from manifold_hc.config import ConnectionConfig
from manifold_hc.models import Decoder, DecoderConfig, count_parameters
from manifold_hc.training import RunConfig
from manifold_hc.training.optimizer import build as build_optimizer

RESIDUAL, MHC, PEER = "residual", "mhc", "transformers"

STREAMS, ANY = "streams", "any"
"""Parts that every kind with several streams has, and that every kind has."""

EXPERT_BLOCKS = 2
"""Blocks with experts that are built and timed; the others are taken to be like them."""


@dataclass
class Part:
    """One piece of the step with one kind of connection, and how often a step has it."""

    name: str
    kind: str
    """residual, mhc, transformers, `STREAMS` or `ANY`."""
    times: float
    forward: list[float]
    """Seconds of every sample, and so `backward`."""
    backward: list[float]

    @property
    def totals(self) -> list[float]:
        """Seconds of every sample."""
        return [a + b for a, b in zip(self.forward, self.backward, strict=True)]

    @property
    def total(self) -> float:
        """Median seconds of one."""
        return median(self.totals)


@dataclass
class StepTable:
    """The parts of a step at one size and dtype."""

    preset: str
    problem: Problem
    parameters: int
    """Of the whole model with residual connections."""
    parts: list[Part] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    """Kinds that could not be timed, and why."""

    @property
    def kinds(self) -> list[str]:
        """The kinds of connection that were timed."""
        return list(dict.fromkeys(p.kind for p in self.parts if p.kind not in (STREAMS, ANY)))

    def layers(self, kind: str) -> list[Part]:
        """The blocks with one kind of connection."""
        return [part for part in self.parts if part.kind == kind]

    def full_step(self) -> float:
        """Seconds of a full-depth step with residual connections."""
        return sum(p.times * p.total for p in self.parts if p.kind in (RESIDUAL, ANY))

    def added(self, kind: str, of: Callable[[list[float]], float] = median) -> float:
        """Seconds that `kind` adds to a step: medians of the differences of neighbouring runs.

        `of` is what stands for a block's differences instead.
        """
        if kind == RESIDUAL:
            return 0.0
        seconds = sum(part.times * part.total for part in self.layers(STREAMS))
        for mine, plain in zip(self.layers(kind), self.layers(RESIDUAL), strict=True):
            pairs = zip(mine.totals, plain.totals, strict=True)
            seconds += mine.times * of([a - b for a, b in pairs])
        return seconds

    def overhead(self, kind: str) -> float:
        """`added` as a share of a full step with residual connections."""
        return self.added(kind) / self.full_step()

    def overhead_range(self, kind: str) -> tuple[float, float]:
        """`overhead` from the lower and from the upper quartiles of the differences."""
        whole = self.full_step()
        return self.added(kind, _lower_quartile) / whole, self.added(kind, _upper_quartile) / whole

    def overhead_without_optimizer(self, kind: str) -> float:
        """The same where many pieces of a batch share one optimizer step."""
        optimizer = sum(part.times * part.total for part in self.parts if part.name == "optimizer")
        return self.added(kind) / (self.full_step() - optimizer)


def _lower_quartile(values: list[float]) -> float:
    return quantiles(values, n=4, method="inclusive")[0] if len(values) > 1 else values[0]


def _upper_quartile(values: list[float]) -> float:
    return -_lower_quartile([-value for value in values])


def bench_step(
    name: str, config: RunConfig, problem: Problem, rounds: int, say: Callable[[str], None]
) -> StepTable:
    """Time every part; the kinds of connection take turns around the same branches."""
    model = config.model
    with torch.device("meta"):
        plain = Decoder(model, ConnectionConfig(kind="residual"))
    table = StepTable(name, problem, count_parameters(plain).total)
    for title, build in (
        ("embedding", lambda: parts.embedding_task(model, problem)),
        ("head and loss", lambda: parts.head_task(model, problem)),
    ):
        say(f"{problem.dtype}: {title}")
        table.parts.append(_part(title, ANY, 1.0, _samples([build()], rounds)[0]))
        gc.collect()
    ends = _samples([parts.ends_task(problem)], rounds)[0]
    table.parts.append(_part("entry and exit", STREAMS, 1.0, ends))
    for title, experts, times in _blocks(model):
        say(f"{problem.dtype}: {title}")
        _time_block(table, title, parts.block(model, experts, problem.device), times, rounds)
        gc.collect()
    say(f"{problem.dtype}: optimizer")
    table.parts.append(_optimizer(table, config, rounds))
    return table


def _blocks(model: DecoderConfig) -> Iterator[tuple[str, bool, float]]:
    """(name, with experts or not, how many of the model's blocks it stands for)."""
    dense = model.experts.dense_blocks if model.experts.routed else model.blocks
    if dense:
        yield "dense block", False, float(dense)
    others = model.blocks - dense
    built = min(EXPERT_BLOCKS, others)
    for index in range(built):
        yield f"expert block {index + 1}", True, others / built


def _time_block(
    table: StepTable, title: str, branches: torch.nn.ModuleList, times: float, rounds: int
) -> None:
    problem = table.problem
    kinds = {RESIDUAL: (parts.residual, 1), MHC: (parts.mhc, problem.streams)}
    kinds[PEER] = (parts.transformers, problem.streams)
    tasks = {}
    for kind, (connect, streams) in kinds.items():
        try:
            tasks[kind] = parts.block_task(branches, connect(problem), streams, problem)
        except ImportError as error:
            table.missing[kind] = f"{error}; pip install 'manifold-hc[bench]'"
    for kind, samples in zip(tasks, _samples(list(tasks.values()), rounds), strict=True):
        table.parts.append(_part(title, kind, times, samples))
    for task in tasks.values():
        task.clear()


def _samples(tasks: list[Task], rounds: int) -> list[list[Sample]]:
    runs = [timed(task) for task in tasks]
    alternate(runs, 1)
    return alternate(runs, rounds)


def _optimizer(table: StepTable, config: RunConfig, rounds: int) -> Part:
    """One step of AdamW over one block, taken as often as the model has more parameters."""
    model = config.model
    branches = parts.block(model, bool(model.experts.routed), table.problem.device)
    optimizer = build_optimizer(branches, config.optimizer)
    for parameter in branches.parameters():
        parameter.grad = torch.randn_like(parameter)
    own = sum(parameter.numel() for parameter in branches.parameters())
    samples = alternate([_stepping(optimizer, table.problem.device)], rounds + 1)[0][1:]
    return _part("optimizer", ANY, table.parameters / own, samples)


def _stepping(optimizer: torch.optim.Optimizer, device: str) -> Run:
    def run() -> Sample:
        start = time.perf_counter()
        optimizer.step()
        if device != "cpu":
            torch.cuda.synchronize()
        return Sample(time.perf_counter() - start, 0.0)

    return run


def _part(name: str, kind: str, times: float, samples: list[Sample]) -> Part:
    return Part(name, kind, times, [s.forward for s in samples], [s.backward for s in samples])
