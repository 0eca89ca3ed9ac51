"""A stack of connections: expands once, runs every sublayer, collapses once.

The only place that sees two neighbours. Between two sublayers the streams are written, and at once
projected and read for the next one: every connection but the last leaves its write to its
successor.
"""

from collections.abc import Sequence, Sized
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from manifold_hc import functional
from manifold_hc.config import ConnectionConfig, require_config
from manifold_hc.connection import Branch, Connection
from manifold_hc.errors import ConfigError, ShapeError, require_integer
from manifold_hc.maps import LearnedExit, Unwritten
from manifold_hc.recompute import Recompute, block_length

if TYPE_CHECKING:
    from manifold_hc.recording import Recording


class Stack(nn.Module):
    """All the connections of a network, in depth order.

    stack = Stack(channels, ConnectionConfig(kind="mhc", streams=4), sublayers=24)
    h = stack(h, branches)      h: [..., C]; branches: one callable per sublayer

    Between two connections the streams are `Unwritten`; what to watch are a connection's `maps`,
    whose forward hooks see the streams and their coefficients once, with and without recompute.

    The exit is the mean of the streams for mHC, their sum for HC (normalise after it), the learned
    exit with deepseek_v4 numerics, and weighted by the last sublayer's pre with single_pass.

    `part` gives some of the sublayers on their own, as a stage of a pipeline runs them.
    """

    def __init__(
        self,
        channels: int,
        config: ConnectionConfig | None = None,
        sublayers: int = 1,
        recompute: Recompute = None,
    ) -> None:
        """recompute: hold only the first streams of every block, rebuild the others in backward.

        A block has as many sublayers as it says, or as take the least memory ("auto"). Outputs and
        gradients are the same bits. Raises ConfigError for sublayers < 1 or such a block.
        """
        super().__init__()
        require_integer("Stack", "channels", channels, 1)
        require_integer("Stack", "sublayers", sublayers, 1)
        self.config = require_config("Stack", config)
        self.recompute = recompute
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
        learned = self.config.exit == "learned"
        self.exit = LearnedExit(channels, self.config) if learned else None

    def _are_equal(self, sublayer: int) -> bool:
        """Streams start equal, and stay so where nothing writes a different share to each."""
        return sublayer == 0 or "post" in self.config.disable

    def reset_parameters(self) -> None:
        """Set the initial values of every connection and of the exit, in depth order."""
        for module in (*present(self.connections), self.exit):
            if module is not None:
                cast(Connection | LearnedExit, module).reset_parameters()

    def part(self, sublayers: Sequence[int]) -> "Stack":
        """The connections of consecutive sublayers, under the names that they have here.

        One without the first sublayer takes streams instead of an embedding, and one without the
        last returns them, as `forward` says. Blocks of recompute begin anew with every part.
        Raises ConfigError for others than there are in a row, or for a block longer than the part.
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
        part.config, part.recompute = self.config, self.recompute
        part.block_length = block_length(self.recompute, len(sublayers), self.config.n)
        part.connections = only(self.connections, sublayers)
        part.exit = self.exit if part.ends else None
        return part

    @property
    def begins(self) -> bool:
        """Whether the first sublayer is here."""
        return self.connections[0] is not None

    @property
    def ends(self) -> bool:
        """Whether the last sublayer is here."""
        return self.connections[-1] is not None

    def forward(
        self,
        h: Float[Tensor, "*inputs C"],
        branches: Sequence[Branch],
        norms: Sequence[Branch] | None = None,
        pre: Float[Tensor, "*batch n"] | None = None,
    ) -> Float[Tensor, "..."] | tuple[Tensor, Tensor]:
        """Embedding in, last hidden state out: [..., C] -> [..., C].

        norms: what each branch's input goes through first, one per sublayer. An RMS or layer norm
        of torch's, or one that has `input_norm`, may be computed with the streams, and under
        recompute its result is not held; any other, and one inside a branch, is as the branch.
        A part that does not begin takes streams [..., n, C], and with single_pass the pre [..., n]
        of the sublayer before; one that does not end returns streams, and that pre.
        Raises ShapeError when there is not one branch per sublayer, and one norm if there are any,
        when a branch changes the shape of its input, or for a pre too many or too few.
        """
        self._require_one_each("branches", branches)
        if norms is not None:
            self._require_one_each("norms", norms)
        wanted = self.config.single_pass and not self.begins
        if (pre is not None) != wanted:
            raise ShapeError(
                "Stack: pre, of the sublayer before, must be given with single_pass to a part that "
                f"does not begin, and nowhere else, but is {'missing' if wanted else 'given'}"
            )
        if not self.block_length or not torch.is_grad_enabled():
            return self._run(h, branches, norms, pre, None)
        from manifold_hc.recording import recorded  # imports Dynamo, which takes a second

        run = partial(self._run, h, branches, norms, pre)
        return recorded(run, self.block_length, h.device.type)

    def _run(
        self,
        h: Tensor,
        branches: Sequence[Branch],
        norms: Sequence[Branch] | None,
        pre: Tensor | None,
        recording: "Recording | None",
    ) -> Tensor | tuple[Tensor, Tensor]:
        source: Tensor | Unwritten = functional.expand(h, self.config.n) if self.begins else h
        for connection, branch, norm in zip(
            present(self.connections), branches, norms or repeat(None), strict=False
        ):
            if recording is None:
                unwritten: Unwritten = connection(source, branch, norm, write=False, before=pre)
            else:
                fused = cast(Connection, connection).fused(source, norm)
                own = norm if fused else recording.norm(norm)
                inner = recording.branch(branch)
                unwritten = connection(source, inner, own, write=False, before=pre)
                recording.keep(unwritten, cast(Connection, connection), fused or norm)
            source = unwritten
        x, pre = unwritten.write(), unwritten.reading.pre
        if self.ends:
            return self.collapse(x, pre)
        return (_owned(x), _owned(pre)) if self.config.single_pass else _owned(x)

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
        """Sublayers, exit and recompute; the connections say the rest."""
        sublayers = len(present(self.connections))
        return f"sublayers={sublayers}, exit={self.config.exit}, recompute={self.recompute}"

    def collapse(
        self, x: Float[Tensor, "*batch n C"], pre: Float[Tensor, "*batch n"] | None = None
    ) -> Float[Tensor, "*batch C"]:
        """The exit alone: streams [..., n, C] -> [..., C].

        pre: that of the last sublayer; single_pass weights the streams by it.
        """
        if self.exit is not None:
            h: Tensor = self.exit(x)
            return h
        if self.config.exit == "pre":
            return functional.collapse(x, pre, self.config.backend)
        mean = functional.collapse(x, backend=self.config.backend)
        return mean * self.config.n if self.config.exit == "sum" else mean


def only(modules: nn.ModuleList, chosen: Sequence[int]) -> nn.ModuleList:
    """Some of the modules, under the names that they have; None in place of the others."""
    return nn.ModuleList(
        cast(nn.Module, module if number in chosen else None)
        for number, module in enumerate(modules)
    )


def present(modules: nn.ModuleList) -> list[nn.Module]:
    """Those that are there, in their order."""
    return [module for module in modules if module is not None]


def _owned(sent: Tensor) -> Tensor:
    """No view: schedules of pipelines detach in place what a stage has sent."""
    return sent.clone() if sent._is_view() else sent
