"""Which backend serves a call, and why another does not; builds and registers what is needed."""

import importlib.util
import os
from collections.abc import Sequence
from functools import cache
from threading import Lock

import torch

from manifold_hc.errors import BackendError
from manifold_hc.kernels import cpu
from manifold_hc.kernels.arguments import Support
from manifold_hc.kernels.cpu.build import library
from manifold_hc.kernels.operators import register

FAILED = "is not there"
"""What a refusal starts with where a backend should have served."""

TRITON_STREAMS = (*range(1, 9), 16)

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def refusal(backend: str, n: int, device: str, dtypes: Sequence[torch.dtype]) -> str:
    """Why `backend` does not serve such a call, with what would help; empty if it does.

    device: the type of device; dtypes: the streams' and those of everything else.
    """
    if backend == "reference":
        return ""
    reason = _triton(n, device, *dtypes) if backend == "triton" else _cpu(n, device, *dtypes)
    if reason:
        return reason
    with _registering:
        return _triton_is_missing() if backend == "triton" else _cpu_is_missing()


def _cpu(n: int, device: str, streams: torch.dtype, *others: torch.dtype) -> str:
    if device != "cpu":
        return f"computes on the CPU but x is on {device}; move x"
    if n > cpu.MAX_STREAMS:
        return f"takes at most {cpu.MAX_STREAMS} streams but there are {n}; use fewer"
    if streams not in cpu.DTYPES:
        return f"takes streams in float32 or bfloat16 but they are {streams}; convert x"
    return _beside(cpu.DTYPES, others)


def _triton(n: int, device: str, streams: torch.dtype, *others: torch.dtype) -> str:
    if device != "cuda" and not (device == "cpu" and is_interpreted()):
        return f"computes on a GPU but x is on {device}; move x"
    if n not in TRITON_STREAMS:
        return f"takes 1 to 8 streams, or 16, but there are {n}; use one of these"
    if streams not in TRITON_DTYPES:
        return f"takes streams in float32, bfloat16 or float16 but they are {streams}; convert x"
    return _beside(TRITON_DTYPES, others)


def _beside(dtypes: Sequence[torch.dtype], others: Sequence[torch.dtype]) -> str:
    wrong = [dtype for dtype in others if dtype not in dtypes]
    return f"takes float32 beside the streams but has {wrong[0]}; convert it" if wrong else ""


def is_interpreted() -> bool:
    """Whether Triton was told to run on the CPU, step by step: for tests."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


_registering = Lock()


@cache
def _cpu_is_missing() -> str:
    """Builds and registers the CPU operators; why that failed, or nothing."""
    try:
        library()
    except BackendError as error:
        return f"{FAILED}: {error}"
    register("cpu", cpu, Support(("cpu",), range(1, cpu.MAX_STREAMS + 1), cpu.DTYPES))
    return ""


@cache
def _triton_is_missing() -> str:
    """Imports Triton and registers its operators; why that failed, or nothing."""
    if importlib.util.find_spec("triton") is None:
        return f"{FAILED}: it needs Triton; pip install 'manifold-hc[triton]'"
    from manifold_hc.kernels import triton

    devices = ("cuda", "cpu") if is_interpreted() else ("cuda",)
    register("triton", triton, Support(devices, TRITON_STREAMS, TRITON_DTYPES))
    return ""
