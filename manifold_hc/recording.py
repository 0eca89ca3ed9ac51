"""Block recompute: keep a block's first streams, rebuild the others in backward (mHC, section 4.3).

What a stack of L sublayers would hold for its backward pass is L times the streams. Of a block of
sublayers a `Recording` keeps the first streams, every branch's output and the coefficients; in
backward it applies the kept coefficients to rebuild the streams and what the branches read. No
branch runs a second time, and no Sinkhorn.

Whoever saves such a tensor, operators and branches alike, is given a handle by saved-tensor hooks.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from manifold_hc import functional
from manifold_hc.connection import Branch, Connection, is_altered, runs_known_forward
from manifold_hc.functional import InputNorm, Reading
from manifold_hc.maps import Unwritten
from manifold_hc.precision import has_autocast

Kind = Literal["streams", "input", "normalised"]

Made = TypeVar("Made")

Autocast = Callable[[], AbstractContextManager[Any]]
"""Autocast as the forward pass had it."""


@dataclass
class Block:
    """What is kept of some sublayers in a row."""

    x: Tensor
    """The first streams."""
    version: int
    """Of x."""
    backend: str
    autocast: Autocast
    """For the norms."""
    writes: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    """y, post and res of every sublayer but the last."""
    reads: list[Tensor] = field(default_factory=list)
    """What every sublayer reads with."""
    norms: list[InputNorm | Branch | None] = field(default_factory=list)
    """What each input goes through, together with its streams or on its own."""
    parameters: list[dict[str, Tensor]] = field(default_factory=list)
    """The norms' own, as they were."""
    versions: list[int] = field(default_factory=list)
    """Of every y."""

    def rebuild(self) -> "Rebuilt":
        """All streams and inputs of the block, bit for bit."""
        with torch.no_grad():
            fused = [norm if isinstance(norm, InputNorm) else None for norm in self.norms]
            writes = self.writes[: len(self.reads) - 1]
            require_unchanged(self.x, self.version)
            for (y, _, _), version in zip(writes, self.versions, strict=False):
                require_unchanged(y, version)
            streams, inputs = functional.rebuild(self.x, writes, self.reads, fused, self.backend)
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
            assert isinstance(norm, nn.Module)
            with torch.no_grad(), self.block.autocast():
                parameters = self.block.parameters[sublayer]
                made = functional_call(norm, parameters, (self.inputs[sublayer],))
                self.normalised = sublayer, made.contiguous()
        return self.normalised[1]


class Slot:
    """Something saved: the tensor itself, or a handle as soon as it is known to be one."""

    __slots__ = ("content", "version")

    def __init__(self, content: Tensor | Handle, version: int) -> None:
        self.content = content
        self.version = version


def require_unchanged(saved: Tensor, version: int) -> None:
    """Raise RuntimeError, as autograd does where it keeps the tensor itself."""
    if saved._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: a {list(saved.shape)} tensor is at version {saved._version}; expected "
            f"version {version} instead"
        )


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
        self._hooks: saved_tensors_hooks | None = None
        self._autocast: Autocast = nullcontext
        if has_autocast(device):
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
        self._versions: dict[int, int] = {}
        """Of what branches were given, by its address."""
        self._streams: Tensor | None = None
        """Of the last sublayer."""
        self._rebuilt: Rebuilt | None = None

    def __enter__(self) -> None:
        self._hooks = saved_tensors_hooks(self._pack, self._unpack)
        self._hooks.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self._hooks is not None:
            self._hooks.__exit__(*error)
        self._hooks = None  # they hold this recording, which would hold them
        self._known.clear()
        self._unsettled.clear()
        self._block = self._streams = None

    def norm(self, norm: Branch | None) -> Branch | None:
        """The norm, and if it may run again one that keeps neither its tensors nor its result."""
        if norm is None:
            return None
        if not isinstance(norm, nn.Module) or not may_run_again(norm):
            return self.branch(norm)

        def run(u: Tensor) -> Tensor:
            self._note(u)
            own = dict(norm.named_parameters())
            made: Tensor = Forgetful.apply(u, norm, self._autocast, tuple(own), *own.values())
            self._normalised = made
            return made

        return run

    def branch(self, branch: Branch) -> Branch:
        """The branch, its input noted before it can be changed."""

        def run(u: Tensor) -> Tensor:
            self._note(u)
            return branch(u)

        return run

    def _note(self, given: Tensor) -> None:
        self._versions[_address(given)] = given._version

    def keep(
        self, unwritten: Unwritten, connection: Connection, norm: InputNorm | Branch | None
    ) -> None:
        """Take over a sublayer: its streams and inputs become handles wherever they are saved."""
        reading = unwritten.reading
        hooked = not all(map(runs_known_forward, (connection, connection.maps)))
        post, res = reading.post.detach(), reading.res.detach()
        if unwritten.config.kind == "residual":  # which adds, whatever its maps say
            post, res = torch.ones_like(post), torch.ones_like(res)
        full = self._block is not None and len(self._block.reads) == self.length
        if self._block is None or full or (hooked and not self._is_written(reading)):
            x, backend = reading.x, unwritten.config.backend
            self._block = Block(x.detach(), x._version, backend, self._autocast)
        block, sublayer = self._block, len(self._block.reads)
        block.reads.append(reading.read_weights.detach())
        block.writes.append((unwritten.y.detach(), post, res))
        block.versions.append(unwritten.y._version)
        self._streams = reading.x.detach()
        fused = None
        if isinstance(norm, InputNorm):
            norm = fused = norm._replace(weight=norm.weight.detach())
        block.norms.append(norm)
        own = dict(norm.named_parameters()) if isinstance(norm, nn.Module) else {}
        block.parameters.append({name: tensor.detach() for name, tensor in own.items()})
        address = _address(reading.x)
        if self._versions.setdefault(address, reading.x._version) != reading.x._version:
            self._block = None  # the branch has changed the streams, which its input is a view of
        else:
            if sublayer:
                self._know(reading.x, block, sublayer, "streams")
            if not hooked or is_read(reading, fused, block.backend):
                self._know(reading.u, block, sublayer, "input")
                if self._normalised is not None:
                    self._know(self._normalised, block, sublayer, "normalised")
        for slot in self._unsettled:
            slot.content = self._settled(slot.content)
        self._unsettled.clear()
        self._versions.clear()
        self._normalised = None
        # The next connection may still save these streams; all else has been saved.
        self._known = {address: self._known[address]} if sublayer and address in self._known else {}

    def _is_written(self, reading: Reading) -> bool:
        """Whether the last write made these streams: a hook may have put others."""
        if self._block is None or self._streams is None:
            return True
        before, write = self._streams, self._block.writes[-1]
        weights, backend = self._block.reads[-1], self._block.backend
        (made,), _ = functional.rebuild(before, [write], [weights] * 2, backend=backend)
        return torch.equal(made, reading.x)

    def _know(self, tensor: Tensor, block: Block, sublayer: int, kind: Kind) -> None:
        address = _address(tensor)
        if not address:
            return  # nothing there: no tokens, or the meta device
        if address not in self._known and address in self._versions and tensor.is_contiguous():
            version = self._versions[address]
            self._known[address] = Known(tensor.detach(), version, block, sublayer, kind)

    def _settled(self, saved: Tensor | Handle) -> Tensor | Handle:
        if isinstance(saved, Handle) or (known := self._known.get(_address(saved))) is None:
            return saved
        return known.handle(saved) or saved

    def _pack(self, saved: Tensor) -> Slot:
        # Detached: an operator that saves its output would hold itself by it.
        slot = Slot(self._settled(saved.detach()), saved._version)
        if isinstance(slot.content, Tensor) and not isinstance(saved, nn.Parameter):
            self._unsettled.append(slot)
        return slot

    def _unpack(self, slot: Slot) -> Tensor:
        handle = slot.content
        if isinstance(handle, Tensor):
            require_unchanged(handle, slot.version)
            return handle
        if self._rebuilt is None or self._rebuilt.block is not handle.block:
            self._rebuilt = None  # its memory is what the next block is rebuilt in
            self._rebuilt = handle.block.rebuild()
        return self._rebuilt.get(handle)


@torch.compiler.disable(
    reason="what is saved is recorded in Python: compile the branches of a stack that recomputes"
)
def recorded(run: Callable[[Recording], Made], length: int, device: str) -> Made:
    """`run`, its saved tensors recorded in blocks of `length` sublayers."""
    with (recording := Recording(length, device)):
        return run(recording)


class Forgetful(torch.autograd.Function):
    """A module that keeps its input alone, and runs again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        module: nn.Module,
        autocast: Autocast,
        names: tuple[str, ...],
        *parameters: Tensor,
    ) -> Tensor:
        """u [..., C]; parameters: the module's own, which may be other ones by then."""
        ctx.module, ctx.autocast, ctx.names = module, autocast, names
        ctx.save_for_backward(u, *parameters)
        made: Tensor = module(u)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The module's own gradients."""
        needed = (ctx.needs_input_grad[0], *ctx.needs_input_grad[4:])
        leaves = [
            tensor.detach().requires_grad_(needs)
            for tensor, needs in zip(ctx.saved_tensors, needed, strict=True)
        ]
        parameters = dict(zip(ctx.names, leaves[1:], strict=True))
        with torch.enable_grad(), ctx.autocast():
            made = functional_call(ctx.module, parameters, (leaves[0],))
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = iter(torch.autograd.grad(made, wanted, grad, allow_unused=True))
        du, *rest = (next(found) if needs else None for needs in needed)
        return du, None, None, None, *rest


def may_run_again(norm: nn.Module) -> bool:
    """True if the norm is pure and unaltered, parts included, so that backward may run it again."""
    return runs_known_forward(norm) and not any(map(is_altered, norm.modules()))


def is_read(reading: Reading, norm: InputNorm | None, backend: str) -> bool:
    """Whether u is what `weights` read: a hook may have replaced it."""
    _, (u,) = functional.rebuild(reading.x, [], [reading.read_weights], [norm], backend)
    return torch.equal(u, reading.u)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
