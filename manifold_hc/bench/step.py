"""`mhc bench step`: the time that mHC adds to a training step, summed from the step's parts."""

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from statistics import median, quantiles
from typing import Any

import torch

from manifold_hc.bench import parts
from manifold_hc.bench.measure.timing import Run, Sample, Timing, call_seconds, measure, timed
from manifold_hc.bench.output.sheet import (
    NONE,
    TIMES,
    Sheet,
    duration,
    increase,
    medians,
    quartiles,
    samples,
)
from manifold_hc.bench.peers import install_hint
from manifold_hc.bench.problem import Problem
from manifold_hc.config import ConnectionConfig
from manifold_hc.models import Decoder, DecoderConfig, count_parameters
from manifold_hc.training import RunConfig
from manifold_hc.training.optimizer import build as build_optimizer

RESIDUAL, MHC, PEER = "residual", "mhc", "transformers"

STREAMS, ANY = "streams", "any"
"""Kinds of the parts that every connection with several streams has, and that every step has."""

EXPERT_BLOCKS = 2
"""Transformer blocks with experts that are built and timed; they stand for all others."""

COLUMNS = ("part", "connection", "per step", *TIMES[:2], "quartiles", "vs residual")

LEGEND = "per step: how often a step has the part; quartiles: of forward and backward, in ms."


@dataclass
class Part(Timing):
    """One part of the step with one kind of connection."""

    name: str
    kind: str
    """residual, mhc, transformers, `STREAMS` or `ANY`."""
    times: float
    """How often a step has it."""

    @property
    def per_step(self) -> float:
        """Median seconds of all of them in a step."""
        return self.times * self.total


@dataclass
class StepResult:
    """Parts of a step at one size and dtype."""

    preset: str
    problem: Problem
    parameters: int
    """Parameters of the whole model with residual connections."""
    parts: list[Part] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    """Kinds that could not be timed, with the reason."""

    @property
    def kinds(self) -> list[str]:
        """Kinds of connection that were timed."""
        return list(dict.fromkeys(p.kind for p in self.parts if p.kind not in (STREAMS, ANY)))

    def of_kind(self, *kinds: str) -> list[Part]:
        """Return the parts of these kinds."""
        return [part for part in self.parts if part.kind in kinds]

    def full_step(self) -> float:
        """Seconds of a full-depth step with residual connections."""
        return sum(part.per_step for part in self.of_kind(RESIDUAL, ANY))

    def added(self, kind: str, average: Callable[[list[float]], float] = median) -> float:
        """Seconds that `kind` adds to a step.

        average: of the differences between samples of the same round, for each part.
        """
        if kind == RESIDUAL:
            return 0.0
        seconds = sum(part.per_step for part in self.of_kind(STREAMS))
        for part, plain in zip(self.of_kind(kind), self.of_kind(RESIDUAL), strict=True):
            pairs = zip(part.totals, plain.totals, strict=True)
            seconds += part.times * average([a - b for a, b in pairs])
        return seconds

    def overhead(self, kind: str) -> float:
        """Return `added` as a share of a full step with residual connections."""
        return self.added(kind) / self.full_step()

    def overhead_range(self, kind: str) -> tuple[float, float]:
        """Return the overhead from the lower, and from the upper quartiles of the differences."""
        quarters = [self.added(kind, partial(_quartile, index=index)) for index in (0, 2)]
        return quarters[0] / self.full_step(), quarters[1] / self.full_step()

    def overhead_without_optimizer(self, kind: str) -> float:
        """Return the overhead where many microbatches share one optimizer step."""
        optimizer = sum(part.per_step for part in self.parts if part.name == "optimizer")
        return self.added(kind) / (self.full_step() - optimizer)

    def add_ratios(self, content: dict[str, Any]) -> None:
        """Add the overheads to the JSON content of this result."""
        content["overhead"] = {kind: self.overhead(kind) for kind in self.kinds}
        content["overhead_quartiles"] = {kind: self.overhead_range(kind) for kind in self.kinds}
        content["residual_step_seconds"] = self.full_step()

    def sheets(self) -> list[Sheet]:
        """Return the one sheet: a row for each part, the overheads as notes."""
        p = self.problem
        notes = [f"a step at full depth with residual connections: {duration(self.full_step())}"]
        for kind in (kind for kind in self.kinds if kind != RESIDUAL):
            low, high = self.overhead_range(kind)
            notes.append(
                f"overhead of {kind}: {100 * self.overhead(kind):.1f} % ({100 * low:.1f} to "
                f"{100 * high:.1f} by the quartiles of the differences), "
                f"{duration(self.added(kind))}; "
                f"{100 * self.overhead_without_optimizer(kind):.1f} % of a step without its "
                "optimizer"
            )
        return [
            Sheet(
                f"{self.preset}, {p.dtype}, {p.size}, {samples(self.parts)}",
                COLUMNS,
                [self._cells(part) for part in self.parts],
                notes,
                LEGEND,
                [f"missing: {kind}: {reason}" for kind, reason in self.missing.items()],
            )
        ]

    def _cells(self, part: Part) -> list[str]:
        plain = {p.name: p for p in self.of_kind(RESIDUAL)}.get(part.name, part)
        return [
            part.name,
            {ANY: NONE, STREAMS: "several streams"}.get(part.kind, part.kind),
            f"{part.times:.3g}",
            *medians(part)[:2],
            quartiles(part),
            "" if part is plain else increase(part, plain),
        ]


def _quartile(values: list[float], index: int) -> float:
    return quantiles(values, n=4, method="inclusive")[index] if len(values) > 1 else values[0]


def bench_step(
    name: str, config: RunConfig, problem: Problem, rounds: int, progress: Callable[[str], None]
) -> StepResult:
    """Time every part; the kinds of connection take turns around the same branches."""
    model = config.model
    with torch.device("meta"):
        plain = Decoder(model, ConnectionConfig(kind="residual"))
    result = StepResult(name, problem, count_parameters(plain).total)

    def add(title: str, kind: str, times: float, run: Run) -> None:
        result.parts.append(Part(title, kind, times))
        measure(result.parts[-1:], [run], rounds, warm_up=1)
        gc.collect()

    for title, build in (
        ("embedding", lambda: parts.embedding_task(model, problem)),
        ("head and loss", lambda: parts.head_task(model, problem)),
    ):
        progress(f"{problem.dtype}: {title}")
        add(title, ANY, 1.0, timed(build()))
    add("entry and exit", STREAMS, 1.0, timed(parts.ends_task(problem)))
    for title, experts, times in _blocks(model):
        progress(f"{problem.dtype}: {title}")
        _time_block(result, title, parts.block(model, experts, problem.device), times, rounds)
        gc.collect()
    progress(f"{problem.dtype}: optimizer")
    own, run = _optimizer_step(config, problem)
    add("optimizer", ANY, result.parameters / own, run)
    return result


def _blocks(model: DecoderConfig) -> Iterator[tuple[str, bool, float]]:
    """(name, with experts or not, number of the model's blocks that it stands for)."""
    dense = model.experts.dense_blocks if model.experts.routed else model.blocks
    if dense:
        yield "dense block", False, float(dense)
    others = model.blocks - dense
    built = min(EXPERT_BLOCKS, others)
    for index in range(built):
        yield f"expert block {index + 1}", True, others / built


def _time_block(
    result: StepResult, title: str, branches: torch.nn.ModuleList, times: float, rounds: int
) -> None:
    problem, tasks = result.problem, {}
    residual = ConnectionConfig(kind="residual")
    for kind, streams, build in (
        (RESIDUAL, 1, lambda: parts.connections(problem, residual)),
        (MHC, problem.streams, lambda: parts.connections(problem, problem.connection())),
        (PEER, problem.streams, lambda: parts.transformers(problem)),
    ):
        try:
            tasks[kind] = parts.block_task(branches, build(), streams, problem)
        except ImportError as error:
            result.missing[kind] = install_hint(error, "cpu")
    rows = [Part(title, kind, times) for kind in tasks]
    measure(rows, [timed(task) for task in tasks.values()], rounds, warm_up=1)
    result.parts += rows
    for task in tasks.values():
        task.clear()


def _optimizer_step(config: RunConfig, problem: Problem) -> tuple[int, Run]:
    """One step of AdamW over one transformer block: its number of parameters, and the run."""
    branches = parts.block(config.model, bool(config.model.experts.routed), problem.device)
    optimizer = build_optimizer(branches, config.optimizer)
    for parameter in branches.parameters():
        parameter.grad = torch.randn_like(parameter)
    own = sum(parameter.numel() for parameter in branches.parameters())
    device = torch.device(problem.device)
    return own, lambda: Sample(call_seconds(device, optimizer.step)[0], 0.0)
