"""Peak memory and number of launches of one forward and backward pass."""

import contextlib
import os
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from manifold_hc.bench.peers.implementations import Implementation
from manifold_hc.bench.problem import Inputs
from manifold_hc.kernels.cpu.memory import BLOCKS


class Cost(NamedTuple):
    """Memory and launches of one forward and backward pass."""

    extra_bytes: int
    """Peak of allocated bytes, less those of u, x' and the gradients of x and y."""
    forward_launches: int | None
    """GPU kernels, or operators that compute on a CPU; None inside compiled code."""
    backward_launches: int | None


def cost(implementation: Implementation, inputs: Inputs) -> Cost:
    """Count one pass; x, y and the gradients of u and x' are allocated before it."""
    task = implementation.task(inputs)
    task.both()
    task.clear()
    own = 2 * (inputs.x.nbytes + inputs.y.nbytes)  # x' and x's gradient, u and y's gradient
    extra = peak_bytes(task.both, task.device) - own
    on_cpu = task.device.type == "cpu"
    if implementation.compiled and on_cpu:
        return Cost(extra, None, None)
    count = operators_run if on_cpu else kernels_launched
    outputs: list[Tensor] = []
    task.clear()
    forward = count(lambda: outputs.extend(task.forward()))
    return Cost(extra, forward, count(lambda: task.backward(outputs)))


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes allocated at one time during `run`, from the allocator's records.

    Includes everything that goes through torch's allocators, from Python, C++ or Triton.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    with (
        _no_messages(),
        _no_reuse(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        run()
    events = profiler.profiler.kineto_results.events()
    changes = [e for e in events if e.name() == "[memory]" and e.device_type() == DeviceType.CPU]
    changes.sort(key=lambda change: change.start_ns())
    return max(accumulate((change.nbytes() for change in changes), initial=0))  # releases: below 0


def operators_run(run: Callable[[], object]) -> int:
    """Count the dispatched operators that compute: neither views nor bare allocations."""
    with _Counter() as counter:
        run()
    return counter.count


def kernels_launched(run: Callable[[], object]) -> int:
    """Count the kernels and copies that the GPU ran."""
    with _no_messages(), profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in profiler.events() or ())


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        self.count += not (func.is_view or name.startswith(("_unsafe_view", "empty", "new_empty")))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _no_reuse() -> Iterator[None]:
    """Make the CPU kernels allocate all memory anew, so that the profiler sees it."""
    limit, BLOCKS.limit = BLOCKS.limit, 0
    try:
        yield
    finally:
        BLOCKS.limit = limit


@contextlib.contextmanager
def _no_messages() -> Iterator[None]:
    """Silence the process's standard error, where some builds of the profiler write messages."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
