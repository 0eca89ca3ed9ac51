"""Fair times: all candidates take turns, each at its own best number of threads."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import torch

from manifold_hc.bench.peers.implementations import quiet
from manifold_hc.bench.task import Task

WARM_UP = 2
"""Runs before anything counts, after the first one that may compile."""

TRIAL = 3
"""Runs at each number of threads, to choose it."""


class Sample(NamedTuple):
    """Seconds of one run."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        """Both."""
        return self.forward + self.backward


@dataclass
class Timing:
    """What was measured of one candidate."""

    threads: int
    """The number it ran fastest with."""
    samples: list[Sample]


Run = Callable[[], Sample]
"""One forward and backward pass that times itself."""


def alternate(runs: Sequence[Run], rounds: int) -> list[list[Sample]]:
    """Samples of each run; they take turns call by call, so that a slow minute hits all.

    Every second round goes backwards: what one run leaves in caches and free memory is not always
    found by the same next one.
    """
    samples: list[list[Sample]] = [[] for _ in runs]
    turns = list(zip(runs, samples, strict=True))
    for _ in range(rounds):
        for run, mine in turns:
            mine.append(run())
        turns.reverse()
    return samples


def measure(runs: Sequence[Run], threads: Sequence[Sequence[int]], rounds: int) -> list[Timing]:
    """Time several runs against one another; `threads`: for each run the numbers to try."""
    before = torch.get_num_threads()
    try:
        alternate([_with_threads(r, t[-1]) for r, t in zip(runs, threads, strict=True)], WARM_UP)
        best = [_best(run, counts) for run, counts in zip(runs, threads, strict=True)]
        chosen = [_with_threads(run, count) for run, count in zip(runs, best, strict=True)]
        samples = alternate(chosen, rounds)
    finally:
        torch.set_num_threads(before)
    return [Timing(*timing) for timing in zip(best, samples, strict=True)]


def thread_counts(device: str, compiled: bool = False) -> list[int]:
    """One and all; compiled code has its number of threads built in, a GPU needs none."""
    everything = torch.get_num_threads()
    return [everything] if compiled or device != "cpu" else sorted({1, everything})


def first_call(run: Callable[[], object]) -> float:
    """Seconds of the first call, with torch.compile's cache out of reach."""
    from torch._inductor.utils import fresh_cache

    with quiet(), fresh_cache():
        began = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - began


def timed(task: Task) -> Run:
    """A task that times its two halves, its gradients fresh every time."""
    clock = _cpu_clock if task.device.type == "cpu" else _cuda_clock

    def run() -> Sample:
        task.clear()
        start = clock()
        outputs = task.forward()
        middle = clock()
        task.backward(outputs)
        end = clock()
        return Sample(_seconds(start, middle), _seconds(middle, end))

    return run


def _best(run: Run, counts: Sequence[int]) -> int:
    if len(counts) == 1:
        return counts[0]
    trials = alternate([_with_threads(run, count) for count in counts], TRIAL)
    totals = [median(sample.total for sample in samples) for samples in trials]
    return counts[min(range(len(counts)), key=totals.__getitem__)]


def _with_threads(run: Run, count: int) -> Run:
    def counted() -> Sample:
        torch.set_num_threads(count)
        with quiet():
            return run()

    return counted


def _cpu_clock() -> float:
    return time.perf_counter()


def _cuda_clock() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(start: object, end: object) -> float:
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
    assert isinstance(start, float)
    assert isinstance(end, float)
    return round(end - start, 9)
