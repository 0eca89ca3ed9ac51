"""`mhc bench memory`: bytes that a stack holds for its backward pass, and the time of recompute."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import nn

from manifold_hc.bench.measure.memory import peak_bytes
from manifold_hc.bench.measure.memory_ledger import KINDS, STREAMS, Branch, Ledger, Norm
from manifold_hc.bench.measure.timing import Timing, measure, timed
from manifold_hc.bench.output.sheet import TIMES, Sheet, increase, samples
from manifold_hc.bench.problem import Problem
from manifold_hc.bench.task import Task, leaf
from manifold_hc.config import Recompute
from manifold_hc.stack import Stack

Norms = Literal["given", "inside"]
"""Place of the input norms: given to the connections, or inside the branches."""

LEGEND = (
    "recompute block: its number of sublayers. Memory in multiples of C per token: by kind, at the "
    "time when the sum of all kinds was largest; rest: other bytes allocated at the peak. Times of "
    "the connections alone; vs all kept: more time than without recompute."
)


@dataclass
class StackRow(Timing):
    """One length of the recompute blocks; seconds are those of the connections alone."""

    recompute: int | None
    """Sublayers in a recompute block; None without recompute."""
    chosen: bool
    """True for the length that "auto" chooses."""
    held: dict[str, int]
    """Bytes by kind at the time when their sum was largest."""
    most_streams: int
    """Largest bytes of streams at any time."""
    peak: int
    """Largest number of bytes allocated."""


@dataclass
class StackResult:
    """Figures of one stack at one size and dtype."""

    problem: Problem
    sublayers: int
    single_pass: bool
    norms: Norms
    rows: list[StackRow]

    def sheets(self) -> list[Sheet]:
        """Return the one sheet: a row for each length of the recompute blocks."""
        p, all_kept = self.problem, next(row for row in self.rows if row.recompute is None)
        norms = "inside the branches" if self.norms == "inside" else "given to the connections"
        title = (
            f"{p.dtype}, {self.sublayers} sublayers{' in single pass' * self.single_pass}, "
            f"{p.size}, norms {norms}, {samples(self.rows)}"
        )
        notes = [
            f"streams held at most: {self._multiples(row.most_streams)}C a token in blocks of "
            f"{row.recompute}, {self._multiples(all_kept.most_streams)}C without"
            for row in self.rows
            if row.chosen
        ]
        columns: dict[str, Callable[[StackRow], str]] = {
            "recompute block": lambda row: (
                "all kept" if row is all_kept else f"{row.recompute}{', auto' * row.chosen}"
            ),
            **{kind: partial(self._held, kind) for kind in KINDS},
            "rest": lambda row: self._multiples(row.peak - sum(row.held.values())),
            "peak": lambda row: self._multiples(row.peak),
            **TIMES,
            "vs all kept": lambda row: "" if row is all_kept else increase(row, all_kept),
        }
        cells = [[cell(row) for cell in columns.values()] for row in self.rows]
        return [Sheet(title, list(columns), cells, notes, LEGEND)]

    def _held(self, kind: str, row: StackRow) -> str:
        return self._multiples(row.held[kind])

    def _multiples(self, size: int) -> str:
        """Bytes in multiples of C elements per token."""
        return f"{size * self.problem.streams / self.problem.stream_bytes:.3g}"


def bench_stacks(
    problem: Problem,
    sublayers: int,
    lengths: Sequence[int],
    single_pass: bool,
    norms: Norms,
    rounds: int,
    progress: Callable[[str], None],
) -> StackResult:
    """Measure every block length, and always without recompute and with the length of "auto".

    Memory: with branches that cost nothing and keep their input, each after a norm. Time: with
    branches that return their input, so that only the connections are left.
    """

    def build(recompute: Recompute) -> Stack:
        config = problem.connection(single_pass=single_pass, phi_std=0.02)
        return Stack(problem.channels, config, sublayers, recompute).to(problem.device)

    chosen = build("auto").block_length
    rows, all_lengths = [], [None, *sorted({*lengths, *filter(None, [chosen])})]
    for length in all_lengths:
        progress(f"{problem.dtype}: memory, recompute {length or 'none'}")
        rows.append(_measure_memory(problem, build(length), norms, length == chosen))
        gc.collect()
    progress(f"{problem.dtype}: {rounds} rounds of all")
    runs = [timed(_connections_alone(problem, build(length))) for length in all_lengths]
    measure(list(zip(rows, runs, strict=True)), rounds, warm_up=1)
    return StackResult(problem, sublayers, single_pass, norms, rows)


def _measure_memory(problem: Problem, stack: Stack, placing: Norms, chosen: bool) -> StackRow:
    channels, sublayers = problem.channels, len(stack.connections)
    branches = [Branch(channels).to(problem.device) for _ in range(sublayers)]
    norms = [Norm(channels, eps=1e-6).to(problem.device) for _ in range(sublayers)]
    modules = [stack, *branches, *norms]
    h = leaf(problem.random(channels))

    def run(ledger: Ledger | None = None) -> None:
        for branch, norm in zip(branches, norms, strict=True):
            branch.ledger = norm.ledger = ledger
        if placing == "given":
            out = stack(h, branches, norms)
        else:
            out = stack(h, [nn.Sequential(*pair) for pair in zip(norms, branches, strict=True)])
        if ledger is not None:
            ledger.is_backward = True
        out.sum().backward()
        for module in modules:
            module.zero_grad()
        h.grad = None

    run()
    with Ledger(problem.stream_bytes) as ledger:
        run(ledger)
    return StackRow(
        recompute=stack.block_length,
        chosen=chosen,
        held={kind: ledger.peak[kind] for kind in KINDS},
        most_streams=ledger.most[STREAMS],
        peak=peak_bytes(run, h.device),
    )


def _connections_alone(problem: Problem, stack: Stack) -> Task:
    h, branches = leaf(problem.random(problem.channels)), [nn.Identity()] * len(stack.connections)
    cotangent = problem.random(problem.channels)
    return Task(lambda: (stack(h, branches),), (h, *stack.parameters()), (cotangent,))
