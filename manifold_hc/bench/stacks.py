"""`mhc bench memory`: what a stack holds for its backward pass, and what holding less costs."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

import torch
from torch import nn

from manifold_hc.bench.measure.memory import peak_bytes
from manifold_hc.bench.measure.memory_ledger import KINDS, STREAMS, Ledger, Norm, Scaled
from manifold_hc.bench.measure.timing import alternate, timed
from manifold_hc.bench.problem import Problem
from manifold_hc.bench.task import Task, leaf
from manifold_hc.config import Recompute
from manifold_hc.stack import Stack

Norms = Literal["given", "inside"]


@dataclass
class StackRow:
    """One block length."""

    recompute: int | None
    """Sublayers a block; None where nothing is rebuilt."""
    chosen: bool
    """Whether "auto" takes it."""
    held: dict[str, int]
    """Bytes by kind when they were most in all."""
    most_streams: int
    """Bytes of streams when those were most."""
    peak: int
    """Most bytes that were allocated."""
    forward: list[float] = field(default_factory=list)
    """Seconds of the connections alone, every sample, and so `backward`."""
    backward: list[float] = field(default_factory=list)

    @property
    def total(self) -> float:
        """Median seconds."""
        return median(a + b for a, b in zip(self.forward, self.backward, strict=True))

    @property
    def rest(self) -> int:
        """Bytes at the peak that are none of the kinds."""
        return self.peak - sum(self.held[kind] for kind in KINDS)


@dataclass
class StackTable:
    """One stack at one size and dtype."""

    problem: Problem
    sublayers: int
    single_pass: bool
    norms: Norms
    rows: list[StackRow]

    def share(self, size: int) -> float:
        """Bytes in numbers a token and channel: multiples of C."""
        return size * self.problem.streams / self.problem.stream_bytes


def bench_stacks(
    problem: Problem,
    sublayers: int,
    lengths: Sequence[int],
    single_pass: bool,
    norms: Norms,
    rounds: int,
    say: Callable[[str], None],
) -> StackTable:
    """Every block length, none and the chosen one among them.

    Memory: branches that cost nothing and keep their input, each behind a norm. Time: branches that
    hand their input on, so that only the connections are left.
    """
    chosen = _stack(problem, sublayers, "auto", single_pass).block_length
    wanted = [None, *sorted({*lengths, *filter(None, [chosen])})]
    rows = []
    for length in wanted:
        say(f"{problem.dtype}: memory, recompute {length or 'none'}")
        stack = _stack(problem, sublayers, length, single_pass)
        rows.append(_held(problem, stack, norms, length == chosen))
        gc.collect()
    say(f"{problem.dtype}: {rounds} rounds of all")
    runs = [timed(_alone(problem, sublayers, length, single_pass)) for length in wanted]
    alternate(runs, 1)
    for row, samples in zip(rows, alternate(runs, rounds), strict=True):
        row.forward = [sample.forward for sample in samples]
        row.backward = [sample.backward for sample in samples]
    return StackTable(problem, sublayers, single_pass, norms, rows)


def _stack(problem: Problem, sublayers: int, recompute: Recompute, single_pass: bool) -> Stack:
    config = problem.connection(single_pass=single_pass, phi_std=0.02)
    return Stack(problem.channels, config, sublayers, recompute).to(problem.device)


def _held(problem: Problem, stack: Stack, placing: Norms, chosen: bool) -> StackRow:
    channels, sublayers = problem.channels, len(stack.connections)
    branches = [Scaled(channels).to(problem.device) for _ in range(sublayers)]
    norms = [Norm(channels, eps=1e-6).to(problem.device) for _ in range(sublayers)]
    modules = [stack, *branches, *norms]
    h = leaf(torch.randn(1, problem.tokens, channels).to(problem.device, problem.torch_dtype))

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
        for owner in modules:
            owner.zero_grad()
        h.grad = None

    run()
    with Ledger(problem.stream_bytes) as ledger:
        run(ledger)
    peak = peak_bytes(run, h.device)
    held = {kind: ledger.peak[kind] for kind in KINDS}
    return StackRow(stack.block_length, chosen, held, ledger.most[STREAMS], peak)


def _alone(problem: Problem, sublayers: int, length: int | None, single_pass: bool) -> Task:
    stack = _stack(problem, sublayers, length, single_pass)
    shape = (1, problem.tokens, problem.channels)
    h, cotangent = (torch.randn(shape).to(problem.device, problem.torch_dtype) for _ in range(2))
    own, branches = leaf(h), [nn.Identity()] * sublayers
    return Task(lambda: (stack(own, branches),), (own, *stack.parameters()), (cotangent,))
