"""Device of a run: its choice, peak memory and determinism."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch

from manifold_hc.errors import ConfigError


def find_device(name: str) -> torch.device:
    """Return the device called `name`; "auto" prefers CUDA (or ROCm), then MPS, then the CPU.

    Raises ConfigError for another name, and for a device that torch does not find.
    """
    found = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(device for device, available in found.items() if available)
    if name not in found:
        raise ConfigError(f"device: must be one of auto, {', '.join(found)} but is {name!r}")
    if not found[name]:
        raise ConfigError(f'device: torch finds no {name} here; use device="cpu" or "auto"')
    return torch.device(name)


def peak_memory(device: torch.device) -> int:
    """Return this process's peak memory on the device in bytes; 0 if it is not measured."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu" or find_spec("resource") is None:
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Use deterministic algorithms on CUDA; on a CPU all operations of a run are deterministic."""
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
