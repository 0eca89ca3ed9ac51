"""Bytes of the live tensors of a pass, by kind."""

from collections import Counter
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from manifold_hc.known_forwards import KNOWN_FORWARDS
from manifold_hc.models.norm import RMSNorm

STREAMS, INPUTS, NORMALISED = "streams", "inputs", "normalised"
BRANCHES, COEFFICIENTS, GRADIENTS = "branch outputs", "coefficients", "stream gradients"
KINDS = (STREAMS, INPUTS, NORMALISED, BRANCHES, COEFFICIENTS, GRADIENTS)

OTHER = "other"
"""Kind of every other tensor."""


class Ledger(TorchDispatchMode):
    """Records every tensor that an operator makes, by kind, until its memory is freed.

    Our operators' names give the kinds of their results; `Branch` and `Norm` label theirs.
    """

    def __init__(self, stream_bytes: int) -> None:
        """stream_bytes: size of the streams, and of their gradients."""
        super().__init__()
        self.stream_bytes = stream_bytes
        self.is_backward = False
        self.peak: Counter[str] = Counter()
        """Bytes of each kind at the time when the sum of all was largest."""
        self.most: Counter[str] = Counter()
        """Largest bytes of each kind at any time."""
        self._alive: dict[int, tuple[StorageWeakRef, int, str]] = {}

    def label(self, made: Tensor, kind: str) -> None:
        """Set the kind of a tensor that an operator has made."""
        storage = made.untyped_storage()
        if kind == OTHER and storage.nbytes() == self.stream_bytes:
            kind = GRADIENTS if self.is_backward else STREAMS
        self._alive[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes(), kind

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        results = [tensor for tensor in tree_leaves(made) if isinstance(tensor, Tensor)]
        for tensor, kind in zip(results, chain(_kinds(func, args), repeat(OTHER)), strict=False):
            known = self._alive.get(tensor.untyped_storage().data_ptr())
            if known is None or known[0].expired():
                self.label(tensor, kind)
        self._alive = {p: entry for p, entry in self._alive.items() if not entry[0].expired()}
        held: Counter[str] = Counter()
        for _, size, kind in self._alive.values():
            held[kind] += size
        self.most |= held
        if held.total() > self.peak.total():
            self.peak = held
        return made


def _kinds(func: Any, args: tuple[Any, ...]) -> tuple[str, ...]:
    """Kinds of the results of one of our operators, such as cpu_boundary; empty for others."""
    operator = func.overloadpacket.__name__.partition("_")[2]
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
    coefficients = (COEFFICIENTS,) * 5
    if operator == "coefficients_and_read":
        return (INPUTS, *coefficients)
    if operator == "boundary":
        return (STREAMS, _input_kind(given["weight"]), *coefficients)
    if operator == "write":
        return (STREAMS,)
    if operator == "rebuild":
        return (*(STREAMS for _ in given["y"]), *map(_input_kind, given["weight"]))
    return ()


def _input_kind(norm_weight: Tensor | None) -> str:
    """Kind of a sublayer's input that an operator has read."""
    return INPUTS if norm_weight is None else NORMALISED


class Branch(nn.Module):
    """A branch that costs next to nothing and keeps its input, as a matrix product does."""

    ledger: Ledger | None = None

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, u: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        made = u * self.weight.to(u.dtype)
        if self.ledger is not None:
            self.ledger.label(made, BRANCHES)
        return made


class Norm(RMSNorm):
    """The norm of a sublayer's input."""

    ledger: Ledger | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        made = super().forward(x)
        if self.ledger is not None:
            self.ledger.label(made, NORMALISED)
        return made


KNOWN_FORWARDS[Norm] = Norm.forward  # the label changes no result: connections may fuse this norm
