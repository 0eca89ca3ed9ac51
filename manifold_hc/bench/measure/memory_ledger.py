"""What tensors a pass holds, by what they are."""

from collections import Counter
from itertools import zip_longest
from typing import Any, cast

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
"""Operators' results that are none of these."""


class Ledger(TorchDispatchMode):
    """Every tensor that operators make, by kind, as long as its memory lives.

    The operators' own names say what their results are; branches and norms say it by `name`.
    """

    def __init__(self, stream_bytes: int) -> None:
        """stream_bytes: of all streams; what else has this size are streams or their gradient."""
        super().__init__()
        self.stream_bytes = stream_bytes
        self.is_backward = False
        self.peak: Counter[str] = Counter()
        """Bytes of each kind when they were most in all."""
        self.most: Counter[str] = Counter()
        """The most bytes that each kind had at any time."""
        self._alive: dict[int, tuple[StorageWeakRef, int, str]] = {}

    def name(self, made: Tensor, kind: str) -> None:
        """Say what kind a tensor is that an operator has made."""
        self._enter(made, kind, again=True)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        results = [tensor for tensor in tree_leaves(made) if isinstance(tensor, Tensor)]
        kinds = _kinds(func.overloadpacket.__name__, args)
        for tensor, kind in zip_longest(results, kinds[: len(results)], fillvalue=OTHER):
            self._enter(cast(Tensor, tensor), kind)
        self._look()
        return made

    def _enter(self, tensor: Tensor, kind: str, again: bool = False) -> None:
        storage = tensor.untyped_storage()
        if kind == OTHER and storage.nbytes() == self.stream_bytes:
            kind = GRADIENTS if self.is_backward else STREAMS
        known = self._alive.get(storage.data_ptr())
        if known is not None and not known[0].expired() and not again:
            return
        self._alive[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes(), kind

    def _look(self) -> None:
        self._alive = {p: entry for p, entry in self._alive.items() if not entry[0].expired()}
        held: Counter[str] = Counter()
        for _, size, kind in self._alive.values():
            held[kind] += size
        for kind, size in held.items():
            self.most[kind] = max(self.most[kind], size)
        if held.total() > self.peak.total():
            self.peak = held


READ = (COEFFICIENTS,) * 5


def _kinds(operator: str, args: tuple[Any, ...]) -> tuple[str, ...]:
    """What an operator's results are."""
    name = operator.partition("_")[2]
    if name == "coefficients_and_read":
        return (INPUTS, *READ)
    if name == "boundary":
        return (STREAMS, INPUTS if args[9] is None else NORMALISED, *READ)
    if name == "write":
        return (STREAMS,)
    if name == "rebuild":
        inputs = (INPUTS if weight is None else NORMALISED for weight in args[5])
        return (*(STREAMS for _ in args[1]), *inputs)
    if name in ("boundary_backward", "coefficients_and_read_backward", "write_backward"):
        return (GRADIENTS,)
    return ()


class Scaled(nn.Module):
    """A branch that costs next to nothing and keeps its input, as a matrix product does."""

    ledger: Ledger | None = None

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, u: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        made = u * self.weight.to(u.dtype)
        if self.ledger is not None:
            self.ledger.name(made, BRANCHES)
        return made


class Norm(RMSNorm):
    """A sublayer's norm."""

    ledger: Ledger | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        made = super().forward(x)
        if self.ledger is not None:
            self.ledger.name(made, NORMALISED)
        return made


KNOWN_FORWARDS[Norm] = Norm.forward  # which only names what the norm makes
