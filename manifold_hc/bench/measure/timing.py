"""The timing engine: runs take turns, each at its own best number of threads."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

import torch

from manifold_hc.bench.task import Task, quiet

WARM_UP = 2
"""Uncounted runs after the first one, which may compile."""

TRIAL = 3
"""Runs at each number of threads, to choose the best."""

CAPTURE_WARM_UP = 3
"""Passes before a capture as CUDA graphs."""


Run = Callable[[], Sequence[float]]
"""One pass that times itself: returns the seconds of forward, and of backward."""


@dataclass(kw_only=True)
class Timing:
    """Samples of one run; the base of every timed row in the result files."""

    forward: list[float] = field(default_factory=list)
    """Seconds of each forward pass."""
    backward: list[float] = field(default_factory=list)
    """Seconds of each backward pass."""
    threads: int | None = None
    """Number of threads; None in files that do not record it."""

    @property
    def totals(self) -> list[float]:
        """Seconds of forward and backward, sample by sample."""
        return [a + b for a, b in zip(self.forward, self.backward, strict=True)]

    @property
    def total(self) -> float:
        """Median seconds of forward and backward."""
        return median(self.totals)

    @property
    def halves(self) -> tuple[float, float]:
        """Median seconds of forward, and of backward."""
        return median(self.forward), median(self.backward)


def measure(
    turns: Sequence[tuple[Timing, Run]],
    rounds: int,
    threads: Sequence[Sequence[int]] | None = None,
    warm_up: int = WARM_UP,
) -> None:
    """Time the runs against one another; fill in the samples and threads of each run's row.

    threads: numbers to try for each run, of which the fastest is kept; torch's number if left out.
    """
    before, runs = torch.get_num_threads(), [run for _, run in turns]
    tried = threads or [[before]] * len(runs)
    try:
        alternate(
            [_with_threads(run, counts[-1]) for run, counts in zip(runs, tried, strict=True)],
            warm_up,
        )
        best = list(map(_best, runs, tried))
        samples = alternate(list(map(_with_threads, runs, best)), rounds)
    finally:
        torch.set_num_threads(before)
    for (row, _), count, own in zip(turns, best, samples, strict=True):
        row.forward, row.backward = map(list, zip(*own, strict=True))
        row.threads = count


def alternate(runs: Sequence[Run], rounds: int) -> list[list[Sequence[float]]]:
    """Sample the runs in turns, call by call, so that a slow minute of the machine affects all.

    Every second round has the reverse order: a run finds caches and free memory as another run left
    them, and that should not always be the same one.
    """
    samples: list[list[Sequence[float]]] = [[] for _ in runs]
    turns = list(zip(runs, samples, strict=True))
    for _ in range(rounds):
        for run, own in turns:
            own.append(run())
        turns.reverse()
    return samples


def thread_counts(device: str, compiled: bool = False) -> list[int]:
    """Return the numbers of threads to try: one and all.

    Only all for compiled code, which has its number built in, and on a GPU.
    """
    everything = torch.get_num_threads()
    return [everything] if compiled or device != "cpu" else sorted({1, everything})


def timed(task: Task, passes: int = 1) -> Run:
    """Return a run that times the two halves of the task, with new gradients every time.

    passes: number of equal passes in the task; the seconds are those of one.
    """

    def run() -> Sequence[float]:
        task.clear()
        outputs: list[torch.Tensor] = []
        seconds = call_seconds(
            task.device,
            lambda: outputs.extend(task.forward()),
            lambda: task.backward(outputs),
        )
        return [each / passes for each in seconds]

    return run


def graphed(task: Task) -> Run | None:
    """Return a run that replays the task as two CUDA graphs, without the time of Python's launches.

    None if the task cannot be captured.
    """
    side, forward, backward = torch.cuda.Stream(), torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    try:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(CAPTURE_WARM_UP):
                torch.autograd.grad(task.forward(), task.leaves, task.cotangents)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(forward):
            outputs = task.forward()
        with torch.cuda.graph(backward, pool=forward.pool()):
            gradients = torch.autograd.grad(outputs, task.leaves, task.cotangents)
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    alive = (outputs, gradients)  # the graphs write into their memory

    def run() -> Sequence[float]:
        assert alive
        return call_seconds(task.device, forward.replay, backward.replay)

    return run


def first_call(run: Callable[[], object]) -> float:
    """Return the seconds of the first call, with torch.compile's cache out of reach."""
    from torch._inductor.utils import fresh_cache

    with quiet(), fresh_cache():
        began = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - began


def copy_bandwidth(device: str, size: int = 256 * 2**20, repeats: int = 10) -> float:
    """Measure copies into memory that is already mapped: median bytes per second, read and written.

    size: bytes of the copied tensor; by default larger than any cache.
    """
    source = torch.ones(size // 4, device=device)
    target = torch.zeros_like(source)
    target.copy_(source)
    seconds = [call_seconds(source.device, lambda: target.copy_(source))[0] for _ in range(repeats)]
    return 2 * size / median(seconds)


def call_seconds(device: torch.device, *calls: Callable[[], object]) -> list[float]:
    """Make the calls one after the other; return the seconds of each, on a GPU by its events."""
    on_cpu = device.type == "cpu"
    marks: list[Any] = [time.perf_counter() if on_cpu else _cuda_event()]
    for call in calls:
        call()
        marks.append(time.perf_counter() if on_cpu else _cuda_event())
    if on_cpu:
        return [round(end - start, 9) for start, end in pairwise(marks)]
    marks[-1].synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairwise(marks)]


def _cuda_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _best(run: Run, counts: Sequence[int]) -> int:
    if len(counts) == 1:
        return counts[0]
    trials = alternate([_with_threads(run, count) for count in counts], TRIAL)
    totals = [median(map(sum, samples)) for samples in trials]
    return counts[totals.index(min(totals))]


def _with_threads(run: Run, count: int) -> Run:
    def run_with_threads() -> Sequence[float]:
        torch.set_num_threads(count)
        with quiet():
            return run()

    return run_with_threads
