"""Why a backend does not support a call; builds and defines the operators of one that does."""

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from threading import Lock

import torch

from manifold_hc.errors import BackendError
from manifold_hc.kernels import cpu
from manifold_hc.kernels.arguments import Support
from manifold_hc.kernels.cpu import functions
from manifold_hc.kernels.operators import Operators

TRITON_STREAMS = (*range(1, 9), 16)

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

OPERATORS: dict[str, Operators] = {}
"""Operators of every compiled backend that this process has used."""


@dataclass(frozen=True)
class Unsupported:
    """Reason why a backend does not support a call."""

    reason: str
    repair: str
    missing: bool = False
    """True if the backend supports such calls but is not usable here, e.g. without a compiler."""

    def __str__(self) -> str:
        """Return the reason with its repair."""
        return f"{self.reason}; {self.repair}" if self.repair else self.reason


def unsupported_reason(
    backend: str, n: int, device: str, dtypes: Sequence[torch.dtype]
) -> Unsupported | None:
    """Return why `backend` does not support such a call; None if it does.

    device: type of device; dtypes: those of the streams and of all other tensors.
    """
    if backend == "reference":
        return None
    check, define = (_triton, _define_triton) if backend == "triton" else (_cpu, _define_cpu)
    if reason := check(n, device, *dtypes):
        return reason
    # An operator is defined once in a process, whichever thread is first.
    with _defining:
        return define()


def _cpu(n: int, device: str, streams: torch.dtype, *others: torch.dtype) -> Unsupported | None:
    if device != "cpu":
        return Unsupported(f"computes on the CPU but x is on {device}", "move x")
    if n > cpu.MAX_STREAMS:
        return Unsupported(
            f"takes at most {cpu.MAX_STREAMS} streams but there are {n}", "use fewer"
        )
    if streams not in cpu.DTYPES:
        return Unsupported(
            f"takes streams in float32 or bfloat16 but they are {streams}", "convert x"
        )
    return _other_dtypes(cpu.DTYPES, others)


def _triton(n: int, device: str, streams: torch.dtype, *others: torch.dtype) -> Unsupported | None:
    if device != "cuda" and not (device == "cpu" and is_interpreted()):
        return Unsupported(f"computes on a GPU but x is on {device}", "move x")
    if n not in TRITON_STREAMS:
        return Unsupported(f"takes 1 to 8 streams, or 16, but there are {n}", "use one of these")
    if streams not in TRITON_DTYPES:
        return Unsupported(
            f"takes streams in float32, bfloat16 or float16 but they are {streams}", "convert x"
        )
    return _other_dtypes(TRITON_DTYPES, others)


def _other_dtypes(
    dtypes: Sequence[torch.dtype], others: Sequence[torch.dtype]
) -> Unsupported | None:
    wrong = [dtype for dtype in others if dtype not in dtypes]
    if not wrong:
        return None
    return Unsupported(f"takes the other tensors in float32 but one is {wrong[0]}", "convert it")


def is_interpreted() -> bool:
    """Return True if TRITON_INTERPRET makes Triton run on the CPU, step by step: for tests."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


_defining = Lock()


@cache
def _define_cpu() -> Unsupported | None:
    """Build and define the CPU operators; return why that failed."""
    try:
        functions.loaded()
    except BackendError as error:
        reason, _, repair = str(error).rpartition("; ")
        return Unsupported(f"is not there: {reason}", repair, missing=True)
    streams = range(1, cpu.MAX_STREAMS + 1)
    OPERATORS["cpu"] = Operators("cpu", Support(("cpu",), streams, cpu.DTYPES))
    return None


@cache
def _define_triton() -> Unsupported | None:
    """Define the Triton operators; return why that failed."""
    if importlib.util.find_spec("triton") is None:
        return Unsupported(
            "is not there: it needs Triton", "pip install 'manifold-hc[triton]'", missing=True
        )
    devices = ("cuda", "cpu") if is_interpreted() else ("cuda",)
    OPERATORS["triton"] = Operators("triton", Support(devices, TRITON_STREAMS, TRITON_DTYPES))
    return None
