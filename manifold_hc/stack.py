"""A stack of connections: expands once, runs every sublayer, collapses once.

The only place that sees two neighbours. Between two sublayers the streams are written, and at once
projected and read for the next one: every connection but the last leaves its write to its
successor.
"""

from collections.abc import Sequence
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from manifold_hc import functional
from manifold_hc.config import ConnectionConfig
from manifold_hc.connection import Branch, Connection
from manifold_hc.errors import ConfigError, ShapeError
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
        if sublayers < 1:
            raise ConfigError(f"Stack: sublayers must be at least 1 but is {sublayers}")
        self.config = config or ConnectionConfig()
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

    def forward(
        self,
        h: Float[Tensor, "*batch C"],
        branches: Sequence[Branch],
        norms: Sequence[Branch] | None = None,
    ) -> Float[Tensor, "*batch C"]:
        """Embedding in, last hidden state out: [..., C] -> [..., C].

        norms: what each branch's input goes through first, one per sublayer. An RMS or layer norm
        of torch's, or one that has `input_norm`, may be computed with the streams, and under
        recompute its result is not held; any other, and one inside a branch, is as the branch.
        Raises ShapeError when there is not one branch per sublayer, and one norm if there are any,
        or when a branch changes the shape of its input.
        """
        self._require_one_each("branches", branches)
        if norms is not None:
            self._require_one_each("norms", norms)
        if not self.block_length or not torch.is_grad_enabled():
            return self._run(h, branches, norms, None)
        from manifold_hc.recording import recorded  # imports Dynamo, which takes a second

        run = partial(self._run, h, branches, norms)
        result: Tensor = recorded(run, self.block_length, h.device.type)
        return result

    def _run(
        self,
        h: Tensor,
        branches: Sequence[Branch],
        norms: Sequence[Branch] | None,
        recording: "Recording | None",
    ) -> Tensor:
        source: Tensor | Unwritten = functional.expand(h, self.config.n)
        for connection, branch, norm in zip(
            self.connections, branches, norms or repeat(None), strict=False
        ):
            if recording is None:
                unwritten: Unwritten = connection(source, branch, norm, write=False)
            else:
                fused = cast(Connection, connection).fused(source, norm)
                own = norm if fused else recording.norm(norm)
                unwritten = connection(source, recording.branch(branch), own, write=False)
                recording.keep(unwritten, cast(Connection, connection), fused or norm)
            source = unwritten
        return self.collapse(unwritten.write(), unwritten.reading.pre)

    def _require_one_each(self, name: str, given: Sequence[Branch]) -> None:
        if len(given) != len(self.connections):
            raise ShapeError(
                f"Stack: {name} must be {len(self.connections)}, one per sublayer, "
                f"but are {len(given)}; attention and feed-forward count as one each"
            )

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
