"""C functions: declared once each, checked against the built library, called by keywords.

A declaration stands in the Python file of its operator. The library exports the signatures of its
functions, derived from their C++ types, and loading it compares both: ctypes itself checks nothing.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from manifold_hc.errors import BackendError, OutOfMemoryError
from manifold_hc.kernels.cpu.build import library

POINTER, INT64, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
STATUS = ctypes.c_int

LETTERS = {POINTER: "p", INT64: "i", FLOAT: "f", STATUS: "s"}
"""Types in a signature, as source/signatures.h writes them."""

NO_MEMORY, OUT_OF_RANGE = 1, 2
"""Statuses, as source/calls.h has them; 0 is success."""

LIMIT = 1 << 63

FUNCTIONS: dict[str, "CFunction"] = {}
"""Every declared function, by name."""


class CFunction:
    """A C function: argument types by name, and its result type."""

    def __init__(self, name: str, result: Any, arguments: dict[str, Any]) -> None:
        self.name = name
        self.result = result
        self.arguments = arguments
        self._pointers = [(each, kind is POINTER) for each, kind in arguments.items()]
        self._function: Callable[..., int] | None = None
        FUNCTIONS[name] = self

    @property
    def signature(self) -> str:
        """Argument types and result type as letters, e.g. "pppi->s"."""
        kinds = "".join(LETTERS[kind] for kind in self.arguments.values())
        return f"{kinds}->{LETTERS[self.result]}"

    def bind(self, found: ctypes.CDLL) -> None:
        """Take the function from a library."""
        function = getattr(found, self.name)
        function.argtypes = list(self.arguments.values())
        function.restype = self.result
        self._function = function

    def call(self, given: dict[str, Any]) -> int:
        """Return the result; `given` has exactly the declared arguments."""
        if self._function is None:
            loaded()
        if len(given) != len(self._pointers):
            raise TypeError(
                f"{self.name}: takes {list(self.arguments)} but was given {list(given)}"
            )
        assert self._function is not None
        # One loop instead of a function an argument: a call takes a few microseconds.
        values = []
        for name, is_pointer in self._pointers:
            value = given[name]
            if is_pointer:
                value = value.data_ptr() if isinstance(value, Tensor) else value
            elif not -LIMIT <= value < LIMIT:  # ctypes would cut it
                raise BackendError(f"the CPU kernels take numbers of 64 bits but one is {value}")
            values.append(value)
        return self._function(*values)


class Kernel(CFunction):
    """A C function that computes, on torch's number of threads, and returns a status."""

    def __call__(self, **arguments: Any) -> None:
        """Run it: tensors as pointers, None as null, numbers as they are.

        Raises OutOfMemoryError, or BackendError for a number that C cannot hold or does not take.
        """
        arguments["threads"] = torch.get_num_threads()
        status = self.call(arguments)
        if not status:
            return
        if status == NO_MEMORY:
            raise OutOfMemoryError(
                f"{self.name}: the CPU kernels found no memory for their own use; "
                "use fewer threads, iterations or channels, or free some memory"
            )
        reason = "was given a number out of its range" if status == OUT_OF_RANGE else "failed"
        numbers = {k: v for k, v in arguments.items() if isinstance(v, int | float)}
        raise BackendError(f'{self.name} {reason}: {numbers}; use backend="reference"')


class Size(CFunction):
    """A C function that returns an int64 and cannot fail."""

    def __call__(self, **arguments: int) -> int:
        """Return its result."""
        return self.call(arguments)


def kernel(name: str, **arguments: Any) -> Kernel:
    """Declare a C function that computes; the last argument, the threads, is common to all."""
    return Kernel(name, STATUS, {**arguments, "threads": INT64})


def size(name: str, **arguments: Any) -> Size:
    """Declare a C function that returns a size."""
    return Size(name, INT64, arguments)


@cache
def loaded() -> ctypes.CDLL:
    """Return the compiled library, every declared function checked and bound.

    Raises BackendError when it cannot be built, or has another signature than a declaration.
    """
    found = library()
    check(found)
    for function in FUNCTIONS.values():
        function.bind(found)
    return found


def check(found: ctypes.CDLL) -> None:
    """Raise BackendError for a function whose signature in C++ is not the declared one."""
    cure = (
        f"delete {found._name} with its folder, or install the wheel again, so that it is built "
        "from this version's sources"
    )
    try:
        export = found.mhc_signatures
    except AttributeError:
        raise BackendError(f"the CPU kernels export no mhc_signatures; {cure}") from None
    export.restype = ctypes.c_char_p
    built = dict(line.split(" ") for line in export().decode().splitlines())
    for name in sorted(FUNCTIONS.keys() | built.keys()):
        declared = FUNCTIONS[name].signature if name in FUNCTIONS else "nothing"
        if built.get(name, "nothing") != declared:
            raise BackendError(
                f"the CPU kernels have {built.get(name, 'nothing')} as {name} "
                f"but Python declares {declared}; {cure}"
            )
