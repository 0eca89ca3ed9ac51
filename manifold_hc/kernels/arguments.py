"""Argument checks of an operator, because kernels trust them: shapes, dtypes, device, numbers.

Users may call an operator through `torch.ops` directly. Kind and shape of a tensor follow from its
name in the schema (`TENSORS`); letters are sizes, the same in all tensors of a call.
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manifold_hc.constraints import CONSTRAINTS, MOST_ITERATIONS
from manifold_hc.errors import BackendError, ConfigError, DtypeError, ShapeError
from manifold_hc.numerics import require_epsilon

STREAMS, BRANCH, WIDE = "streams", "branch", "wide"

TENSORS = {
    **dict.fromkeys(("x", "written", "link", "grad_written", "grad_link"), (STREAMS, "NnC")),
    "v": (STREAMS, "NK"),
    "grad_u": (STREAMS, "NC"),
    "y": (BRANCH, "NC"),
    **dict.fromkeys(("pre", "post", "grad_pre", "grad_post"), (WIDE, "Nn")),
    **dict.fromkeys(("logits", "res", "grad_res"), (WIDE, "Nnn")),
    "phi": (WIDE, "RK"),
    "alpha": (WIDE, "3"),
    "bias": (WIDE, "R"),
    "weight": (WIDE, "C"),
    **dict.fromkeys(("projected", "grad_projected"), (WIDE, "NR")),
    "inverse_rms": (WIDE, "N"),
}
"""Kind and shape of every tensor: N tokens, n streams, C channels, R rows of phi, K its columns.

Streams have one dtype in a call and so has the branch, any that the backend takes; wide tensors are
in float32.
"""

MOST_ROWS = 1 << 20
"""Largest number of rows of phi."""


class Support(NamedTuple):
    """Devices, numbers of streams and dtypes that a backend's kernels take."""

    devices: Collection[str]
    streams: Collection[int]
    dtypes: Collection[torch.dtype]


def arguments_of(schema: str) -> list[tuple[str, str]]:
    """(type, name) of the arguments in a schema, or in a fragment of one."""
    inside = schema.removeprefix("(").partition(") ->")[0]
    return [(kind, name) for kind, _, name in (a.partition(" ") for a in inside.split(", "))]


class Arguments:
    """Check of one operator's arguments, from its schema; call it with those of a call."""

    def __init__(self, operator: str, schema: str, support: Support) -> None:
        """`schema`: as PyTorch takes it, "(Tensor x, ...) -> ..."."""
        self.operator = operator
        self.support = support
        typed = arguments_of(schema)
        self.tensors = [
            (index, name, *TENSORS[name])
            for index, (kind, name) in enumerate(typed)
            if kind.startswith("Tensor")
        ]
        self.has_lists = any(kind.endswith("[]") for kind, _ in typed)
        self.numbers = {
            name: index for index, (kind, name) in enumerate(typed) if not kind.startswith("Tensor")
        }

    def __call__(self, arguments: Sequence[Any], computes: bool) -> None:
        """Raise ShapeError, DtypeError, ConfigError or BackendError for a call no kernel can take.

        computes: True if a kernel runs next; torch.compile asks for shapes alone.
        """
        sizes: dict[str, int] = {"3": 3}
        dtypes = {WIDE: torch.float32}
        device = None
        for index, name, kind, letters in self.tensors:
            argument = arguments[index]
            if argument is None:
                continue
            for tensor in argument if self.has_lists and _is_list(argument) else (argument,):
                if tensor is None:
                    continue
                shape = tensor.shape
                if len(shape) != len(letters) or tensor.layout is not torch.strided:
                    self._refuse_shape(name, tensor, letters, sizes)
                for letter, size in zip(letters, shape, strict=True):
                    if sizes.setdefault(letter, size) != size:
                        self._refuse_shape(name, tensor, letters, sizes)
                if tensor.dtype is not dtypes.setdefault(kind, tensor.dtype):
                    self._refuse_dtype(name, tensor, dtypes[kind])
                if device is None:
                    device = tensor.device
                elif tensor.device != device:
                    self._refuse_device(name, tensor, device)
        self._check_support(sizes, dtypes, device, computes)
        if self.numbers:
            self._check_numbers(arguments, sizes)
        if self.has_lists:
            self._check_counts(arguments)

    def _check_support(
        self,
        sizes: dict[str, int],
        dtypes: dict[str, torch.dtype],
        device: torch.device | None,
        computes: bool,
    ) -> None:
        n, R = sizes.get("n", 1), sizes.get("R", 1)
        if n not in self.support.streams:
            raise BackendError(
                f"{self.operator}: takes {_listed(self.support.streams)} streams but there are {n}"
            )
        if sizes.get("C", 1) < 1 or sizes.get("K", 1) < 1 or not 1 <= R <= MOST_ROWS:
            raise ShapeError(
                f"{self.operator}: needs channels, and 1 to {MOST_ROWS} rows of phi, but has sizes "
                f"{_known(sizes)}"
            )
        if "C" in sizes and "K" in sizes and sizes["K"] != n * sizes["C"]:
            raise ShapeError(
                f"{self.operator}: phi must have {n * sizes['C']} columns, one for each channel of "
                f"{n} streams, but has {sizes['K']}"
            )
        for kind in (STREAMS, BRANCH):
            if kind in dtypes and dtypes[kind] not in self.support.dtypes:
                raise DtypeError(
                    f"{self.operator}: {kind} must be in {_listed(self.support.dtypes)} "
                    f"but came in {dtypes[kind]}"
                )
        kind = "cpu" if device is None else device.type
        if kind not in self.support.devices and (computes or kind != "meta"):
            raise BackendError(
                f"{self.operator}: computes on {_listed(self.support.devices)} but tensors are on "
                f"{kind}; move them"
            )

    def _check_numbers(self, arguments: Sequence[Any], sizes: dict[str, int]) -> None:
        for name, index in self.numbers.items():
            value = arguments[index]
            if name == "constraint":
                if value not in CONSTRAINTS or not CONSTRAINTS[value].in_kernels:
                    fused = [name for name, row in CONSTRAINTS.items() if row.in_kernels]
                    raise ConfigError(
                        f"{self.operator}: constraint must be one of "
                        f"{', '.join(fused)} but is {value!r}"
                    )
                n = sizes["n"]
                rows = 2 * n + CONSTRAINTS[value].size(n)
                if sizes["R"] != rows:
                    raise ShapeError(
                        f"{self.operator}: phi must have {rows} rows for {n} streams and "
                        f"constraint {value} but has {sizes['R']}"
                    )
            elif name == "iterations":
                if not 1 <= value <= MOST_ITERATIONS:
                    raise ConfigError(
                        f"{self.operator}: iterations must be from 1 to {MOST_ITERATIONS} "
                        f"but is {value}"
                    )
            elif name.endswith("_eps"):
                for eps in value if isinstance(value, list | tuple) else (value,):
                    require_epsilon(f"{self.operator}: {name}", eps)

    def _check_counts(self, arguments: Sequence[Any]) -> None:
        """Require one entry a write in the lists of `rebuild`, and one more in those of reads."""
        counts = {name: len(arguments[index]) for index, name, *_ in self.tensors if name != "x"}
        counts["input_eps"] = len(arguments[self.numbers["input_eps"]])
        writes = counts["y"]
        wanted = {name: writes + (name in ("pre", "weight", "input_eps")) for name in counts}
        if counts != wanted:
            raise ShapeError(
                f"{self.operator}: must have {wanted} for {writes} writes but has {counts}"
            )

    def _refuse_shape(self, name: str, tensor: Tensor, letters: str, sizes: dict[str, int]) -> None:
        wanted = ", ".join(str(sizes.get(letter, letter)) for letter in letters)
        raise ShapeError(
            f"{self.operator}: {name} must be a dense tensor [{wanted}] "
            f"but is {list(tensor.shape)}, {tensor.layout}"
        )

    def _refuse_dtype(self, name: str, tensor: Tensor, wanted: torch.dtype) -> None:
        raise DtypeError(f"{self.operator}: {name} must be {wanted} but is {tensor.dtype}")

    def _refuse_device(self, name: str, tensor: Tensor, wanted: torch.device) -> None:
        raise BackendError(
            f"{self.operator}: {name} must be on {wanted} like the others but is on "
            f"{tensor.device}; move it"
        )


def _is_list(argument: Any) -> bool:
    return isinstance(argument, list | tuple)


def _listed(values: Collection[Any]) -> str:
    if isinstance(values, range):
        return f"{values[0]} to {values[-1]}"
    return ", ".join(str(value) for value in values)


def _known(sizes: dict[str, int]) -> str:
    return ", ".join(f"{letter} = {size}" for letter, size in sizes.items() if letter != "3")
