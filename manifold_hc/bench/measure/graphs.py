"""CUDA graphs: a pass without the time that Python takes to launch it."""

import torch

from manifold_hc.bench.measure.timing import Run, Sample, call_seconds
from manifold_hc.bench.task import Task

WARM_UP = 3
"""Passes before the capture."""


def graphed(task: Task) -> Run | None:
    """Capture the task as two graphs and return their replay; None if it cannot be captured."""
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
    alive = (outputs, gradients)  # the graphs write into their memory

    def run() -> Sample:
        assert alive
        return Sample(*call_seconds(task.device, forward.replay, backward.replay))

    return run
