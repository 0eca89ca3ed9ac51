"""`mhc bench step`: the time that mHC adds to a training step, summed from the step's parts."""

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from statistics import median, quantiles
from typing import Any

import torch

from manifold_hc.bench import parts
from manifold_hc.bench.measure.timing import Run, Timing, call_seconds, measure, timed
from manifold_hc.bench.output.sheet import (
    NONE,
    TIMES,
    Sheet,
    duration,
    increase,
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
        plain = {part.name: part for part in self.of_kind(RESIDUAL)}
        shown = {ANY: NONE, STREAMS: "several streams"}
        columns: dict[str, Callable[[Part], str]] = {
            "part": lambda part: part.name,
            "connection": lambda part: shown.get(part.kind, part.kind),
            "per step": lambda part: f"{part.times:.3g}",
            "forward ms": TIMES["forward ms"],
            "backward ms": TIMES["backward ms"],
            "quartiles": quartiles,
            "vs residual": lambda part: (
                increase(part, plain[part.name]) if part.kind in (MHC, PEER) else ""
            ),
        }
        title = f"{self.preset}, {p.dtype}, {p.size}, {samples(self.parts)}"
        cells = [[cell(part) for cell in columns.values()] for part in self.parts]
        missing = [f"missing: {kind}: {reason}" for kind, reason in self.missing.items()]
        return [Sheet(title, list(columns), cells, notes, LEGEND, missing)]


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

    def add(title: str, times: float, build: Callable[[], dict[str, Run]]) -> None:
        progress(f"{problem.dtype}: {title}")
        turns = [(Part(title, kind, times), run) for kind, run in build().items()]
        measure(turns, rounds, warm_up=1)
        result.parts += [part for part, _ in turns]
        turns.clear()  # free the tensors before the next part is built
        gc.collect()

    add("embedding", 1.0, lambda: {ANY: timed(parts.embedding_task(model, problem))})
    add("head and loss", 1.0, lambda: {ANY: timed(parts.head_task(model, problem))})
    add("entry and exit", 1.0, lambda: {STREAMS: timed(parts.ends_task(problem))})
    for title, experts, times in _blocks(model):
        add(title, times, partial(_block_runs, result, model, experts))
    branches = parts.block(model, bool(model.experts.routed), problem.device)
    own = sum(parameter.numel() for parameter in branches.parameters())
    add("optimizer", result.parameters / own, lambda: {ANY: _optimizer_run(branches, config)})
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


def _block_runs(result: StepResult, model: DecoderConfig, experts: bool) -> dict[str, Run]:
    """Runs of a transformer block by kind of connection, all around the same branches."""
    problem, runs = result.problem, {}
    branches = parts.block(model, experts, problem.device)
    residual = ConnectionConfig(kind="residual")
    for kind, streams, build in (
        (RESIDUAL, 1, lambda: parts.connections(problem, residual)),
        (MHC, problem.streams, lambda: parts.connections(problem, problem.connection())),
        (PEER, problem.streams, lambda: parts.transformers(problem)),
    ):
        try:
            runs[kind] = timed(parts.block_task(branches, build(), streams, problem))
        except ImportError as error:
            result.missing[kind] = install_hint(error, "cpu")
    return runs


def _optimizer_run(branches: torch.nn.Module, config: RunConfig) -> Run:
    """One step of AdamW over the parameters of a transformer block."""
    optimizer = build_optimizer(branches, config.optimizer)
    for parameter in branches.parameters():
        parameter.grad = torch.randn_like(parameter)
    device = next(branches.parameters()).device
    return lambda: [*call_seconds(device, optimizer.step), 0.0]
