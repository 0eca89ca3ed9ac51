"""Block recompute: hold a block's first streams, rebuild the others in backward (mHC, section 4.3).

Without recompute, a stack of L sublayers holds L times the streams for its backward pass. With it,
a `RecomputeContext` holds, for each block of sublayers, the first streams, the output of every
branch and the coefficients; backward applies the held coefficients again and gets the other streams
and the inputs of the branches back, with the same bits. No branch runs a second time, and no
Sinkhorn iteration.

Worked example: L = 6 sublayers in blocks of 3. Before sublayer l the streams are x_l; its input is
u_l, normalised z_l = norm(u_l), and the output of its branch is y_l.

    sublayer      0            1            2        |   3            4            5
    held          x_0 y_0      y_1          y_2      |   x_3 y_3      y_4          y_5
                  and pre, post, res of every sublayer
    handle        u_0 z_0      x_1 u_1 z_1  x_2 u_2 z_2 | u_3 z_3     x_4 u_4 z_4  x_5 u_5 z_5

Forward: autograd saves tensors for the operators and inside the branches. Saved-tensor hooks see
each of them; `keep`, called after every sublayer, replaces those that can be rebuilt by handles
(block, sublayer, kind, view), so that their memory is freed.

Backward: sublayer 5 runs first. Its first handle rebuilds the block of sublayers 3 to 5 as a whole
from x_3, in one kernel: x_4 = res_3 x_3 + post_3 y_3, then x_5, and every u_l = pre_l x_l. z_l is
computed from u_l when it is asked for, one at a time. When backward reaches sublayer 2, its first
handle drops the tensors of the later block and rebuilds x_1, x_2 and u_0 to u_2.

At most ceil(L / 3) first streams and one rebuilt block are held: equation 20 of the paper, which
`config.block_length` minimises for "auto".
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
from manifold_hc.connection import Branch, Connection
from manifold_hc.functional import InputNorm, Reading
from manifold_hc.known_forwards import is_pure, runs_known_forward
from manifold_hc.maps import PendingWrite
from manifold_hc.precision import has_autocast

Kind = Literal["streams", "input", "normalised"]
"""Tensors that can be rebuilt: x_l, u_l and z_l of the example."""

Result = TypeVar("Result")

Autocast = Callable[[], AbstractContextManager[Any]]
"""Makes the autocast context of the forward pass."""


@dataclass
class Block:
    """Tensors held for a run of consecutive sublayers."""

    x: Tensor
    """Streams before the first sublayer."""
    version: int
    """Autograd's version counter of x, to detect a change in place."""
    backend: str
    autocast: Autocast
    """Autocast of the forward pass, for the norms that run again."""
    writes: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    """y, post and res of every sublayer."""
    read_weights: list[Tensor] = field(default_factory=list)
    """Weights that every sublayer reads with."""
    norms: list[InputNorm | Branch | None] = field(default_factory=list)
    """Norm of every input: an InputNorm if the fused kernel computed it, else the module."""
    parameters: list[dict[str, Tensor]] = field(default_factory=list)
    """Parameters of the norm modules, as the forward pass used them."""
    versions: list[int] = field(default_factory=list)
    """Version counter of every y."""

    def rebuild(self) -> "Rebuilt":
        """Rebuild all streams and inputs of the block, with the same bits."""
        with torch.no_grad():
            fused = [norm if isinstance(norm, InputNorm) else None for norm in self.norms]
            # The last write makes the first streams of the next block, which holds them itself.
            writes = self.writes[: len(self.read_weights) - 1]
            require_unchanged(self.x, self.version)
            for (y, _, _), version in zip(writes, self.versions, strict=False):
                require_unchanged(y, version)
            streams, inputs = functional.rebuild(
                self.x, writes, self.read_weights, fused, self.backend
            )
        return Rebuilt(self, [self.x, *streams], inputs)


class Handle(NamedTuple):
    """Stands for a tensor that can be rebuilt, or for a view of one."""

    block: Block
    sublayer: int
    """Index in the block."""
    kind: Kind
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    """Elements between the tensor's first and the view's."""


@dataclass
class Rebuilt:
    """Rebuilt tensors of one block, held while its backward runs."""

    block: Block
    streams: list[Tensor]
    inputs: list[Tensor]
    normalised: tuple[int, Tensor] | None = None
    """Sublayer and value of the norm that was computed last."""

    def get(self, handle: Handle) -> Tensor:
        """Return the tensor or view that the handle stands for."""
        # A saved view, such as a transpose, is cut out of the rebuilt tensor the same way.
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


class Saved:
    """Content of one slot of autograd: the tensor, or its handle once `keep` has run."""

    __slots__ = ("content", "version")

    def __init__(self, content: Tensor | Handle, version: int) -> None:
        self.content = content
        self.version = version


def require_unchanged(saved: Tensor, version: int) -> None:
    """Raise autograd's own RuntimeError if the tensor was modified in place since it was saved."""
    if saved._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: a {list(saved.shape)} tensor is at version {saved._version}; expected "
            f"version {version} instead"
        )


class Rebuildable(NamedTuple):
    """A tensor of the forward pass together with the means to rebuild it."""

    tensor: Tensor
    version: int
    block: Block
    sublayer: int
    kind: Kind

    def handle(self, saved: Tensor) -> Handle | None:
        """Return the handle of a saved view; None if it was changed or has another dtype."""
        if saved._version != self.version or saved.dtype != self.tensor.dtype:
            return None
        offset = int(saved.storage_offset() - self.tensor.storage_offset())
        return Handle(self.block, self.sublayer, self.kind, saved.size(), saved.stride(), offset)


class RecomputeContext:
    """One forward pass of a stack: a context around it, with `keep` called after every sublayer."""

    def __init__(self, length: int, device: str) -> None:
        """length: sublayers in a block; device: device type of the streams."""
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
        self._rebuildable: dict[int, Rebuildable] = {}
        """Keyed by the address of their storage, which the entry keeps alive."""
        self._undecided: list[Saved] = []
        """Saved since the last `keep`, which decides which of them become handles."""
        self._normalised: Tensor | None = None
        """Output of this sublayer's norm, if that can run again."""
        self._versions: dict[int, int] = {}
        """Version of every tensor that a norm or branch got as input, by its address."""
        self._streams: Tensor | None = None
        """Streams before the last sublayer."""
        self._rebuilt: Rebuilt | None = None

    def __enter__(self) -> None:
        self._hooks = saved_tensors_hooks(self._pack, self._unpack)
        self._hooks.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self._hooks is not None:
            self._hooks.__exit__(*error)
        self._hooks = None  # breaks the cycle: the hooks refer to this context
        self._rebuildable.clear()
        self._undecided.clear()
        self._block = self._streams = None

    def norm(self, norm: Branch | None) -> Branch | None:
        """Wrap a norm; a pure one then saves neither its own tensors nor its result."""
        if norm is None:
            return None
        if not isinstance(norm, nn.Module) or not is_pure(norm):
            return self.branch(norm)

        def run(u: Tensor) -> Tensor:
            self._note_version(u)
            own = dict(norm.named_parameters())
            made: Tensor = RecomputedNorm.apply(u, norm, self._autocast, tuple(own), *own.values())
            self._normalised = made
            return made

        return run

    def branch(self, branch: Branch) -> Branch:
        """Wrap a branch: note the version of its input before the branch can change it."""

        def run(u: Tensor) -> Tensor:
            self._note_version(u)
            return branch(u)

        return run

    def _note_version(self, given: Tensor) -> None:
        self._versions[_address(given)] = given._version

    def end_block(self) -> None:
        """End the block before a sublayer that is not recomputed."""
        self._block = self._streams = None
        self._rebuildable.clear()
        self._undecided.clear()

    def keep(
        self, pending: PendingWrite, connection: Connection, norm: InputNorm | Branch | None
    ) -> None:
        """Hold a sublayer's y and coefficients; turn its saved streams and inputs into handles."""
        reading = pending.reading
        # A hook on the maps may have replaced any tensor of the reading: then every claim below
        # ("these streams were written by the last write") is checked by value.
        hooked = not runs_known_forward(connection.maps)
        full = self._block is not None and len(self._block.read_weights) == self.length
        if self._block is None or full or (hooked and not self._is_written(reading)):
            x, backend = reading.x, pending.config.backend
            self._block = Block(x.detach(), x._version, backend, self._autocast)
        # Index in the block: x_0 of a block is held, x_1 and later are rebuilt.
        block, sublayer = self._block, len(self._block.read_weights)
        fused = _hold(block, pending, norm)
        self._streams = reading.x.detach()
        address = _address(reading.x)
        if self._versions.setdefault(address, reading.x._version) != reading.x._version:
            # The branch has changed the streams in place, through its input, a view of them.
            self._block = None
        else:
            if sublayer:
                self._add_rebuildable(reading.x, block, sublayer, "streams")
            if not hooked or is_read(reading, fused, block.backend):
                self._add_rebuildable(reading.u, block, sublayer, "input")
                if self._normalised is not None:
                    self._add_rebuildable(self._normalised, block, sublayer, "normalised")
        # Now that the sublayer's tensors are known: drop those saved that can be rebuilt.
        for slot in self._undecided:
            slot.content = self._as_handle(slot.content)
        self._undecided.clear()
        self._versions.clear()
        self._normalised = None
        # The next write saves these streams once more; no other tensor of this sublayer is saved
        # later, and an entry would keep its memory alive.
        streams = self._rebuildable.get(address) if sublayer else None
        self._rebuildable = {} if streams is None else {address: streams}

    def _is_written(self, reading: Reading) -> bool:
        """True if the last write made these streams, rather than a hook."""
        if self._block is None or self._streams is None:
            return True
        before, write = self._streams, self._block.writes[-1]
        weights, backend = self._block.read_weights[-1], self._block.backend
        (made,), _ = functional.rebuild(before, [write], [weights] * 2, backend=backend)
        return torch.equal(made, reading.x)

    def _add_rebuildable(self, tensor: Tensor, block: Block, sublayer: int, kind: Kind) -> None:
        address = _address(tensor)
        if not address:
            return  # no memory: no tokens, or the meta device
        if (
            address not in self._rebuildable
            and address in self._versions
            and tensor.is_contiguous()
        ):
            version = self._versions[address]
            self._rebuildable[address] = Rebuildable(
                tensor.detach(), version, block, sublayer, kind
            )

    def _as_handle(self, saved: Tensor | Handle) -> Tensor | Handle:
        if isinstance(saved, Handle):
            return saved
        found = self._rebuildable.get(_address(saved))
        return saved if found is None else found.handle(saved) or saved

    def _pack(self, saved: Tensor) -> Saved:
        # Detached: a function that saves its output would otherwise refer to itself.
        slot = Saved(self._as_handle(saved.detach()), saved._version)
        if isinstance(slot.content, Tensor) and not isinstance(saved, nn.Parameter):
            self._undecided.append(slot)
        return slot

    def _unpack(self, slot: Saved) -> Tensor:
        handle = slot.content
        if isinstance(handle, Tensor):
            require_unchanged(handle, slot.version)
            return handle
        if self._rebuilt is None or self._rebuilt.block is not handle.block:
            self._rebuilt = None  # frees the later block's memory first, for this one to reuse
            self._rebuilt = handle.block.rebuild()
        return self._rebuilt.get(handle)


@torch.compiler.disable(
    reason="saved tensors are recorded in Python: compile the branches of a stack that recomputes"
)
def run_with_recompute(
    run: Callable[[RecomputeContext], Result], length: int, device: str
) -> Result:
    """Call `run` in a RecomputeContext with blocks of `length` sublayers."""
    with (context := RecomputeContext(length, device)):
        return run(context)


class RecomputedNorm(torch.autograd.Function):
    """A norm module that holds only its input, and runs again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        module: nn.Module,
        autocast: Autocast,
        names: tuple[str, ...],
        *parameters: Tensor,
    ) -> Tensor:
        """u: [..., C]. parameters: the module's, saved because it may have others in backward."""
        ctx.module, ctx.autocast, ctx.names = module, autocast, names
        ctx.save_for_backward(u, *parameters)
        made: Tensor = module(u)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Run the module again on its input, and return autograd's gradients of that."""
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


def is_read(reading: Reading, norm: InputNorm | None, backend: str) -> bool:
    """True if u is the read of x with `read_weights`, rather than a hook's tensor."""
    _, (u,) = functional.rebuild(reading.x, [], [reading.read_weights], [norm], backend)
    return torch.equal(u, reading.u)


def _hold(block: Block, pending: PendingWrite, norm: InputNorm | Branch | None) -> InputNorm | None:
    """Append a sublayer to the block; return the norm that the fused kernel computed, if any."""
    reading = pending.reading
    post, res = reading.post.detach(), reading.res.detach()
    if pending.config.kind == "residual":  # its write adds, with coefficients of 1 in any case
        post, res = torch.ones_like(post), torch.ones_like(res)
    fused = None
    if isinstance(norm, InputNorm):
        norm = fused = norm._replace(weight=norm.weight.detach())
    own = dict(norm.named_parameters()) if isinstance(norm, nn.Module) else {}
    block.read_weights.append(reading.read_weights.detach())
    block.writes.append((pending.y.detach(), post, res))
    block.versions.append(pending.y._version)
    block.norms.append(norm)
    block.parameters.append({name: tensor.detach() for name, tensor in own.items()})
    return fused


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
