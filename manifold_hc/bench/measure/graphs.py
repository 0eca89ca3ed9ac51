"""CUDA graphs: a pass without the time that Python takes to launch it."""

import torch

from manifold_hc.bench.measure.timing import Run, Sample
from manifold_hc.bench.task import Task

WARM_UP = 3
"""Passes before the capture."""


def graphed(task: Task) -> Run | None:
    """The task as two replayed graphs; None where it cannot be captured."""
    try:
        return _captured(task)
    except RuntimeError:
        torch.cuda.synchronize()
        return None


def _captured(task: Task) -> Run:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            torch.autograd.grad(task.forward(), task.leaves, task.cotangents)
    torch.cuda.current_stream().wait_stream(side)
    forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(forward):
        outputs = task.forward()
    with torch.cuda.graph(backward, pool=forward.pool()):
        gradients = torch.autograd.grad(outputs, task.leaves, task.cotangents)
    kept = (outputs, gradients)

    def run() -> Sample:
        assert kept
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        marks[0].record()
        forward.replay()
        marks[1].record()
        backward.replay()
        marks[2].record()
        marks[2].synchronize()
        return Sample(marks[0].elapsed_time(marks[1]) / 1e3, marks[1].elapsed_time(marks[2]) / 1e3)

    return run
