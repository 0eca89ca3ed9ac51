"""A stack of connections: expands once, runs every sublayer, reduces the streams once.

The Stack is the only place that sees two neighbours. Between two sublayers lies a boundary: the
write of the one, the coefficients and the read of the next. The Stack decides once per boundary
whether one fused kernel computes all of it (`Stack._boundary`), and passes the decision down.
"""

from collections.abc import Sequence, Sized
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from manifold_hc import functional
from manifold_hc.config import ConnectionConfig, Recompute, block_length, require_config
from manifold_hc.connection import Branch, Connection
from manifold_hc.errors import ConfigError, ShapeError, require_integer
from manifold_hc.functional import InputNorm
from manifold_hc.known_forwards import is_untouched, kernel_norm
from manifold_hc.maps import LearnedExit, PendingWrite

if TYPE_CHECKING:
    from manifold_hc.recompute import RecomputeContext


class BoundaryPlan(NamedTuple):
    """Plan of the boundary before one sublayer."""

    source: Tensor | PendingWrite
    """Written streams; or the pending write, if the fused kernel writes them."""
    input_norm: InputNorm | None
    """Norm of the sublayer's input if the fused kernel computes it; else the norm itself runs."""


class Stack(nn.Module):
    """All connections of a network, in depth order.

    The exit is the mean of the streams for mHC, their sum for HC (put a norm after it), the learned
    exit with deepseek_v4 numerics, and weighted by the last sublayer's pre in single pass; the
    configuration's `exit` replaces it.

    Hooks on a connection's `maps` see streams and coefficients as a `functional.Reading`, once per
    forward pass. A connection with hooks or a forward of its own is called as `connection(x,
    branch)` on written streams, and its sublayer is not recomputed.

    Args:
        channels: Channels C of a stream.
        config: Kind and sizes of every connection; None for the paper's mHC with four streams.
        sublayers: Number L of sublayers; attention and feed-forward count as one each.
        recompute: Length of a recompute block in sublayers, "auto" for the one that holds least,
            None for off. Only the first streams of a block are held for backward, which rebuilds
            the others; outputs and gradients have the same bits (mHC, section 4.3).

    Raises:
        ConfigError: For fewer than 1 sublayers or channels, a config of another type, or a block
            length out of range.

    Example:
        >>> import torch, manifold_hc as mhc
        >>> stack = mhc.Stack(8, mhc.ConnectionConfig(kind="mhc", streams=4), sublayers=2)
        >>> branches = [torch.nn.Linear(8, 8) for _ in range(2)]
        >>> stack(torch.randn(2, 5, 8), branches).shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        channels: int,
        config: ConnectionConfig | None = None,
        sublayers: int = 1,
        recompute: Recompute = None,
    ) -> None:
        """Create the connections with their initial values."""
        super().__init__()
        require_integer("Stack", "channels", channels, 1)
        require_integer("Stack", "sublayers", sublayers, 1)
        self.config = require_config("Stack", config)
        self.recompute = recompute
        self.owned = True
        self.block_length = block_length(recompute, sublayers, self.config.n)
        self.connections = nn.ModuleList(
            Connection(
                channels,
                self.config,
                sublayer,
                equal_streams=self._are_equal(sublayer),
                stacked=True,
            )
            for sublayer in range(sublayers)
        )
        learned = self.config.exit_rule == "learned"
        self.exit = LearnedExit(channels, self.config) if learned else None

    def _are_equal(self, sublayer: int) -> bool:
        """True if the streams before this sublayer are equal.

        They are equal after `expand`, and stay equal if every stream gets the same write.
        """
        return sublayer == 0 or "post" in self.config.disable

    def reset_parameters(self) -> None:
        """Set the initial values of every connection and of the exit, in depth order."""
        for module in (*present(self.connections), self.exit):
            if module is not None:
                cast(Connection | LearnedExit, module).reset_parameters()

    def part(self, sublayers: Sequence[int], *, owned: bool = True) -> "Stack":
        """Return the connections of consecutive sublayers as a Stack, such as a pipeline stage.

        Parameters keep their names. A part without the first sublayer takes streams instead of an
        embedding, and a part without the last returns streams, as `forward` says. Recompute blocks
        start anew in every part.
        owned: False if the streams that the part returns may be a view, which saves a copy of them;
        a stage of torch's pipelines must own its outputs.
        Raises ConfigError for sublayers that are not consecutive or not present, or for a recompute
        block longer than the part.
        """
        known = [number for number, there in enumerate(self.connections) if there is not None]
        wanted = list(sublayers)
        if not wanted or wanted != [n for n in known if wanted[0] <= n <= wanted[-1]]:
            raise ConfigError(
                f"Stack: a part must be consecutive ones of sublayers {known[0]} to {known[-1]} "
                f"but is {sublayers}"
            )
        part = Stack.__new__(Stack)
        nn.Module.__init__(part)
        part.config, part.recompute, part.owned = self.config, self.recompute, owned
        part.block_length = block_length(self.recompute, len(sublayers), self.config.n)
        part.connections = only(self.connections, sublayers)
        part.exit = self.exit if part.ends else None
        return part

    @property
    def begins(self) -> bool:
        """True if this part has the first sublayer."""
        return self.connections[0] is not None

    @property
    def ends(self) -> bool:
        """True if this part has the last sublayer."""
        return self.connections[-1] is not None

    def forward(
        self,
        h: Float[Tensor, "*inputs C"],
        branches: Sequence[Branch],
        norms: Sequence[Branch] | None = None,
        pre: Float[Tensor, "*batch n"] | None = None,
    ) -> Float[Tensor, "..."] | tuple[Tensor, Tensor]:
        """Expand the embedding, run every sublayer, reduce the streams.

        Args:
            h: Embedding [..., C]; for a part without the first sublayer streams [..., n, C].
            branches: One callable [..., C] -> [..., C] per sublayer.
            norms: One norm per sublayer, which the branch's input goes through first. An RMS or
                layer norm of torch, or a class with a method `input_norm`, may be computed by the
                fused kernel, and its result is not held under recompute. Any other norm, and a
                norm inside a branch, runs as part of the branch.
            pre: With single_pass, for a part without the first sublayer: the pre [..., n] of the
                sublayer before.

        Returns:
            The last hidden state [..., C]. A part without the last sublayer returns streams
            [..., n, C], and with single_pass (streams, pre).

        Raises:
            ShapeError: If there is not one branch per sublayer, or one norm per sublayer; if a
                branch changes the shape of its input; if `pre` is missing or superfluous.
            ConfigError: If single_pass meets a connection with hooks or a forward of its own.
        """
        self._require_one_each("branches", branches)
        if norms is not None:
            self._require_one_each("norms", norms)
        wanted = self.config.is_single_pass and not self.begins
        if (pre is not None) != wanted:
            raise ShapeError(
                "Stack: pre, of the sublayer before, must be given to a part without the first "
                "sublayer if single_pass is on, and only then, "
                f"but is {'missing' if wanted else 'given'}"
            )
        if not self.block_length or not torch.is_grad_enabled():
            return self._run(h, branches, norms, pre, None)
        from manifold_hc.recompute import run_with_recompute  # imports Dynamo, which takes a second

        run = partial(self._run, h, branches, norms, pre)
        return run_with_recompute(run, self.block_length, h.device.type)

    def _run(
        self,
        h: Tensor,
        branches: Sequence[Branch],
        norms: Sequence[Branch] | None,
        pre: Tensor | None,
        context: "RecomputeContext | None",
    ) -> Tensor | tuple[Tensor, Tensor]:
        source: Tensor | PendingWrite = functional.expand(h, self.config.n) if self.begins else h
        for module, branch, norm in zip(
            present(self.connections), branches, norms or repeat(None), strict=False
        ):
            connection = cast(Connection, module)
            # Invariant: `source` holds x_l, the streams before sublayer l, or the pending write
            # that makes them; `pre` is pre_{l-1} with single_pass, else None.
            if is_untouched(connection):
                source = self._run_sublayer(connection, source, branch, norm, pre, context)
                pre = source.reading.pre if self.config.is_single_pass else None
            else:
                source = self._run_altered(connection, _written(source), branch, norm, context)
        x = _written(source)
        if self.ends:
            return self.collapse(x, pre)
        if self.owned:
            x, pre = _owned(x), None if pre is None else _owned(pre)
        return (x, cast(Tensor, pre)) if self.config.is_single_pass else x

    def _boundary(self, source: Tensor | PendingWrite, norm: Branch | None) -> BoundaryPlan:
        """Decide whether one operator computes the boundary, and which norm with it.

        The only place in the package that decides it. `functional.boundary` needs a pending write
        and maps that kernels compute (`reads_in_kernel`); the configuration's `fuse_boundaries` can
        switch it off. The reference has no kernels: it computes the same operator in steps.
        """
        config = self.config
        fused = config.fuse_boundaries and config.reads_in_kernel
        # The first sublayer, and one after an altered connection, have written streams already.
        if not isinstance(source, PendingWrite) or not fused:
            return BoundaryPlan(_written(source), None)
        return BoundaryPlan(source, None if norm is None else kernel_norm(norm, source.reading.x))

    def _run_sublayer(
        self,
        connection: Connection,
        source: Tensor | PendingWrite,
        branch: Branch,
        norm: Branch | None,
        previous_pre: Tensor | None,
        context: "RecomputeContext | None",
    ) -> PendingWrite:
        boundary = self._boundary(source, norm)
        # The norm module runs only if the kernel has not computed it.
        own_norm = None if boundary.input_norm else norm
        if context is None:
            return connection.run(
                boundary.source, branch, own_norm, boundary.input_norm, previous_pre
            )
        pending = connection.run(
            boundary.source,
            context.branch(branch),
            context.norm(own_norm),
            boundary.input_norm,
            previous_pre,
        )
        context.keep(pending, connection, boundary.input_norm or norm)
        return pending

    def _run_altered(
        self,
        connection: Connection,
        x: Float[Tensor, "*batch n C"],
        branch: Branch,
        norm: Branch | None,
        context: "RecomputeContext | None",
    ) -> Float[Tensor, "*batch n C"]:
        """Call a connection that has hooks or a forward of its own, as its user would."""
        if self.config.is_single_pass:
            raise ConfigError(
                f"Stack: connection {connection.sublayer} has hooks or a forward of its own, which "
                "get no pre of the sublayer before, as single_pass needs; put hooks on its maps, "
                "and shard the stack rather than its connections"
            )
        if context is not None:
            context.end_block()
        made: Tensor = connection(x, branch if norm is None else lambda u: branch(norm(u)))
        return made

    def _require_one_each(self, name: str, given: Sequence[Branch]) -> None:
        sublayers = len(present(self.connections))
        if not isinstance(given, Sized):  # a generator is used up by one pass
            raise ShapeError(
                f"Stack: {name} must be a list of {sublayers}, one per sublayer, "
                f"but is {type(given).__name__}; write list(...)"
            )
        if len(given) != sublayers:
            raise ShapeError(
                f"Stack: {name} must be {sublayers}, one per sublayer, "
                f"but are {len(given)}; attention and feed-forward count as one each"
            )

    def extra_repr(self) -> str:
        """Number of sublayers, exit and recompute."""
        sublayers = len(present(self.connections))
        return f"sublayers={sublayers}, exit={self.config.exit_rule}, recompute={self.recompute}"

    def collapse(
        self, x: Float[Tensor, "*batch n C"], pre: Float[Tensor, "*batch n"] | None = None
    ) -> Float[Tensor, "*batch C"]:
        """Reduce the streams [..., n, C] to the last hidden state [..., C].

        pre: the last sublayer's, by which single_pass weights the streams.
        """
        if self.exit is not None:
            h: Tensor = self.exit(x)
            return h
        # Single pass: h = sum_i pre_{L-1}[i] x_L[i], the read that no sublayer follows.
        if self.config.exit_rule == "pre":
            return functional.collapse(x, pre, self.config.backend)
        mean = functional.collapse(x, backend=self.config.backend)
        # HC: h = sum_i x_L[i] (arXiv 2409.19606, section 2).
        return mean * self.config.n if self.config.exit_rule == "sum" else mean


def only(modules: nn.ModuleList, chosen: Sequence[int]) -> nn.ModuleList:
    """Return the chosen modules under their names; None in place of the others."""
    return nn.ModuleList(
        cast(nn.Module, module if number in chosen else None)
        for number, module in enumerate(modules)
    )


def present(modules: nn.ModuleList) -> list[nn.Module]:
    """Return the modules that are not None, in order."""
    return [module for module in modules if module is not None]


def _written(source: Tensor | PendingWrite) -> Float[Tensor, "*batch n C"]:
    return source.write() if isinstance(source, PendingWrite) else source


def _owned(output: Tensor) -> Tensor:
    """Copy a view: a schedule of torch's pipelines detaches the outputs of a stage in place."""
    if torch.compiler.is_compiling():  # Dynamo does not trace _is_view
        return output
    return output.clone() if output._is_view() else output
