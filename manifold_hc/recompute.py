"""Block recompute: keep a block's first streams, rebuild the others in backward (mHC, section 4.3).

What a stack of L sublayers would hold for its backward pass is L times the streams. Of a block of
sublayers a `Recording` keeps the first streams, every branch's output and the coefficients; in
backward it applies the kept coefficients to rebuild the streams and what the branches read. No
branch runs a second time, and no Sinkhorn.

Whoever saves such a tensor, operators and branches alike, is given a handle by saved-tensor hooks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from manifold_hc import functional
from manifold_hc.connection import Branch, Unwritten
from manifold_hc.errors import ConfigError
from manifold_hc.functional import Reading

Recompute = Literal["auto"] | int | None
"""Whether streams are rebuilt, and how many sublayers make a block."""

Kind = Literal["streams", "input", "normalised"]


def block_length(recompute: Recompute, sublayers: int, n: int) -> int | None:
    """Sublayers a block; None where nothing is recomputed.

    "auto": the length L_r that minimises what is held at once, `n ceil(L / L_r) + (n + 2) L_r`
    times C numbers a token (mHC, equation 20), the smallest one if there are several.
    Raises ConfigError for a length below 1 or above the sublayers.
    """
    if recompute is None:
        return None
    if recompute == "auto":
        return min(
            range(1, sublayers + 1),
            key=lambda length: n * math.ceil(sublayers / length) + (n + 2) * length,
        )
    if isinstance(recompute, bool) or not isinstance(recompute, int):
        raise ConfigError(f'recompute: must be None, "auto" or a block length but is {recompute!r}')
    if not 1 <= recompute <= sublayers:
        raise ConfigError(
            f"recompute: a block must have 1 to {sublayers} sublayers, as many as the stack, "
            f'but has {recompute}; "auto" chooses'
        )
    return recompute


@dataclass
class Block:
    """What is kept of some sublayers in a row."""

    x: Tensor
    """The first streams."""
    backend: str
    autocast: Callable[[], torch.autocast]
    """As the forward pass had it, for the norms."""
    writes: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    """y, post and res of every sublayer but the last."""
    reads: list[Tensor] = field(default_factory=list)
    """What every sublayer reads with."""
    norms: list[Branch | None] = field(default_factory=list)

    def rebuild(self) -> "Rebuilt":
        """All streams and inputs of the block, bit for bit."""
        with torch.no_grad():
            streams, inputs = functional.rebuild(
                self.x, self.writes[: len(self.reads) - 1], self.reads, self.backend
            )
        return Rebuilt(self, [self.x, *streams], inputs)


class Handle(NamedTuple):
    """Stands for a tensor that can be rebuilt, or for a view of one."""

    block: Block
    sublayer: int
    """Counted in its block."""
    kind: Kind
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass
class Rebuilt:
    """A block's tensors, while its backward needs them."""

    block: Block
    streams: list[Tensor]
    inputs: list[Tensor]
    normalised: tuple[int, Tensor] | None = None
    """The last one that was asked for, and its sublayer."""

    def get(self, handle: Handle) -> Tensor:
        """The tensor that the handle stands for."""
        if handle.kind == "streams":
            whole = self.streams[handle.sublayer]
        elif handle.kind == "input":
            whole = self.inputs[handle.sublayer]
        else:
            whole = self._normalised(handle.sublayer)
        return whole.as_strided(handle.size, handle.stride, whole.storage_offset() + handle.offset)

    def _normalised(self, sublayer: int) -> Tensor:
        if self.normalised is None or self.normalised[0] != sublayer:
            norm = self.block.norms[sublayer]
            assert norm is not None
            with torch.no_grad(), self.block.autocast():
                self.normalised = sublayer, norm(self.inputs[sublayer]).contiguous()
        return self.normalised[1]


class Slot:
    """Something saved: the tensor itself, or a handle as soon as it is known to be one."""

    __slots__ = ("content",)

    def __init__(self, content: Tensor | Handle) -> None:
        self.content = content


class Known(NamedTuple):
    """A tensor that can be rebuilt."""

    tensor: Tensor
    version: int
    block: Block
    sublayer: int
    kind: Kind

    def handle(self, saved: Tensor) -> Handle | None:
        """For a saved view of it; None if it has been changed since it was made."""
        if saved._version != self.version or saved.dtype != self.tensor.dtype:
            return None
        offset = int(saved.storage_offset() - self.tensor.storage_offset())
        return Handle(self.block, self.sublayer, self.kind, saved.size(), saved.stride(), offset)


class Recording:
    """One forward pass of a stack: `with recording:` around it, `keep` after every connection."""

    def __init__(self, length: int, device: str) -> None:
        """length: sublayers a block; device: the type of the streams' device."""
        self.length = length
        self._hooks = saved_tensors_hooks(self._pack, self._unpack)
        self._autocast = partial(
            torch.autocast,
            device,
            dtype=torch.get_autocast_dtype(device),
            enabled=torch.is_autocast_enabled(device),
        )
        self._block: Block | None = None
        self._known: dict[int, Known] = {}
        """By the address of their memory, which they hold."""
        self._unsettled: list[Slot] = []
        self._normalised: Tensor | None = None
        self._rebuilt: Rebuilt | None = None

    def __enter__(self) -> None:
        self._hooks.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        self._known.clear()
        self._unsettled.clear()
        self._block = None

    def norm(self, norm: Branch | None) -> Branch | None:
        """The norm, which keeps nothing: neither its own tensors nor its result."""
        if norm is None:
            return None

        def run(u: Tensor) -> Tensor:
            normalised = checkpoint(norm, u, use_reentrant=False, preserve_rng_state=False)
            self._normalised = cast(Tensor, normalised)
            return self._normalised

        return run

    def keep(self, unwritten: Unwritten, maps: nn.Module, norm: Branch | None) -> None:
        """Take over a sublayer: its streams and inputs become handles wherever they are saved."""
        reading = unwritten.reading
        if self._block is None or len(self._block.reads) == self.length:
            self._block = Block(reading.x.detach(), unwritten.config.backend, self._autocast)
        block, sublayer = self._block, len(self._block.reads)
        block.reads.append(reading.weights.detach())
        block.writes.append((unwritten.y.detach(), reading.post.detach(), reading.res.detach()))
        block.norms.append(norm)
        if sublayer:
            self._know(reading.x, block, sublayer, "streams")
        if is_read(reading, maps, block.backend):
            self._know(reading.u, block, sublayer, "input")
            if self._normalised is not None:
                self._know(self._normalised, block, sublayer, "normalised")
        self._normalised = None
        for slot in self._unsettled:
            slot.content = self._settled(slot.content)
        self._unsettled.clear()
        # The next connection may still save these streams; all else has been saved.
        address = _address(reading.x)
        self._known = {address: self._known[address]} if sublayer and address in self._known else {}

    def _know(self, tensor: Tensor, block: Block, sublayer: int, kind: Kind) -> None:
        if _address(tensor) not in self._known and tensor.is_contiguous():
            known = Known(tensor.detach(), tensor._version, block, sublayer, kind)
            self._known[_address(tensor)] = known

    def _settled(self, saved: Tensor | Handle) -> Tensor | Handle:
        if isinstance(saved, Handle) or (known := self._known.get(_address(saved))) is None:
            return saved
        return known.handle(saved) or saved

    def _pack(self, saved: Tensor) -> Slot:
        slot = Slot(self._settled(saved))
        if isinstance(slot.content, Tensor) and not isinstance(saved, nn.Parameter):
            self._unsettled.append(slot)
        return slot

    def _unpack(self, slot: Slot) -> Tensor:
        handle = slot.content
        if isinstance(handle, Tensor):
            return handle
        if self._rebuilt is None or self._rebuilt.block is not handle.block:
            self._rebuilt = None  # its memory is what the next block is rebuilt in
            self._rebuilt = handle.block.rebuild()
        return self._rebuilt.get(handle)


def is_read(reading: Reading, maps: nn.Module, backend: str) -> bool:
    """Whether u is what `weights` read: a hook of the maps may have replaced it."""
    if not maps._forward_hooks and not nn.modules.module._global_forward_hooks:
        return True
    with torch.no_grad():
        return torch.equal(functional.read(reading.x, reading.weights, backend), reading.u)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
