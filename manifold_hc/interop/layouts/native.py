"""Names and shapes of the connections of a `Stack`: the layout that all others map to."""

import re
from math import isqrt
from typing import Literal

import torch
from torch import Tensor

from manifold_hc.config import ConnectionConfig
from manifold_hc.stack import Stack

Parameter = Literal["phi", "alpha", "bias"]

EXIT = -1
"""Number of the exit, in place of a sublayer's."""

MATRICES = ("sinkhorn", "sinkhorn_columns", "exact", "none")
"""Constraints whose logits are an n*n matrix."""

NATIVE = re.compile(r"(?:connections\.(?P<sublayer>\d+)\.maps|exit)\.(?P<parameter>phi|alpha|bias)")


def native_name(sublayer: int, parameter: Parameter) -> str:
    """Return the name in `Stack.state_dict()` of a parameter of a sublayer or of the exit."""
    return f"exit.{parameter}" if sublayer == EXIT else f"connections.{sublayer}.maps.{parameter}"


def parse_native(name: str) -> tuple[int, Parameter] | None:
    """Return sublayer and parameter of a native name; None for any other name."""
    match = NATIVE.fullmatch(name)
    if match is None:
        return None
    parameter: Parameter = match["parameter"]  # type: ignore[assignment]
    return (EXIT if match["sublayer"] is None else int(match["sublayer"])), parameter


def native_shapes(
    config: ConnectionConfig, channels: int, sublayers: int
) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of a Stack, by native name; allocate none of them."""
    with torch.device("meta"):
        stack = Stack(channels, config, sublayers)
    return {name: tuple(parameter.shape) for name, parameter in stack.named_parameters()}


def streams_of(rows: int) -> int | None:
    """Return n if `rows` is n*n + 2n, the number of rows of a connection; None if it is not."""
    n = isqrt(rows + 1) - 1
    return n if n >= 1 and n * (n + 2) == rows else None


def transpose_res(packed: Tensor, n: int) -> Tensor:
    """Transpose the n*n rows `res` of phi [n*n + 2n, nC] or of a bias [n*n + 2n]."""
    res = packed[2 * n :].unflatten(0, (n, n)).transpose(0, 1).flatten(0, 1)
    return torch.cat([packed[: 2 * n], res])
