"""The C functions: their arguments, declared once, and the errors behind what they return."""

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from manifold_hc.errors import BackendError, OutOfMemoryError
from manifold_hc.kernels.cpu.build import library

FUNCTIONS = {
    "mhc_sinkhorn": "pp iiii f",
    "mhc_sinkhorn_backward": "ppp iiii f",
    "mhc_project": "pppp iii f i",
    "mhc_project_backward": "pppppppp iiii",
    "mhc_read": "ppp iiii",
    "mhc_read_backward": "ppppp iiii",
    "mhc_write": "ppppp iiiii",
    "mhc_write_backward": "ppppppppp iiiii",
    "mhc_branch_backward": "ppppp iiiii",
    "mhc_boundary": "pppp pp f pppp pppppp iiii iiiff ii",
    "mhc_boundary_backward": "pppppp pppp ppp p f ppp pppp ppp ppp iiii iiiff i ii",
    "mhc_rebuild": "ppppp pppp iiiiii",
}
"""Pointers, int64 and floats, in C's order; a last int64, the threads, and the status are common.

`bool` and sizes alike are int64.
"""

SIZES = {"mhc_slices": "i", "mhc_slice_floats": "iii"}
"""Functions that return an int64 and cannot fail."""

KINDS = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}

NO_MEMORY, OUT_OF_RANGE = 1, 2
"""Statuses, as calls.h has them; 0 is success."""

LIMIT = 1 << 63


@cache
def _declared(loaded: ctypes.CDLL) -> dict[str, Callable[..., int]]:
    """The library's functions with their types; ctypes would guess, and cut what is too long."""
    functions: dict[str, Callable[..., int]] = {}
    for name, kinds in (FUNCTIONS | SIZES).items():
        function = getattr(loaded, name, None)
        if function is None:
            raise BackendError(
                f"the CPU kernels have no {name}, so they are of another version; "
                "delete them and let them be built again"
            )
        fails = name in FUNCTIONS
        function.argtypes = [KINDS[kind] for kind in kinds.replace(" ", "") + "i" * fails]
        function.restype = ctypes.c_int if fails else ctypes.c_int64
        functions[name] = function
    return functions


def call(name: str, *arguments: Any) -> None:
    """Run a function of `FUNCTIONS`: tensors as pointers, None as null, numbers as they are.

    Raises OutOfMemoryError, or BackendError for a number that C cannot hold or does not take.
    """
    function = _declared(library())[name]
    status = function(*map(_passed, arguments), torch.get_num_threads())
    if status == NO_MEMORY:
        raise OutOfMemoryError(
            f"{name}: the CPU kernels found no memory for their own use; "
            "use fewer threads, iterations or channels, or free some memory"
        )
    if status:
        reason = "was given a number out of its range" if status == OUT_OF_RANGE else "failed"
        numbers = [a for a in arguments if isinstance(a, int | float)]
        raise BackendError(f'{name} {reason}: {numbers}; use backend="reference"')


def size(name: str, *numbers: int) -> int:
    """The result of a function of `SIZES`."""
    return _declared(library())[name](*map(_passed, numbers))


def _passed(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    if isinstance(argument, int) and not -LIMIT <= argument < LIMIT:
        raise BackendError(f"the CPU kernels take numbers of 64 bits but one is {argument}")
    return argument
