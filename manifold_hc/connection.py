"""One sublayer's connection: residual, hyper-connection (HC) or manifold-constrained (mHC)."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from manifold_hc import constraints
from manifold_hc.config import ConnectionConfig, require_config
from manifold_hc.errors import ConfigError, ShapeError, require_integer
from manifold_hc.functional import InputNorm
from manifold_hc.known_forwards import KNOWN_FORWARDS
from manifold_hc.maps import Maps, PendingWrite, ResidualMaps

Branch = Callable[[Tensor], Tensor]
"""Sublayer function [..., C] -> [..., C]; its norm is inside unless the Stack gets it alone."""


class Connection(nn.Module):
    """Connection around one sublayer: reads the streams, runs the branch, mixes and writes.

    `u = sum_i pre[i] x[i]`, `x'[o] = sum_i res[o, i] x[i] + post[o] branch(u)` (arXiv 2512.24880,
    equation 3). The coefficients come from `maps`, a module with this connection's parameters.

    Args:
        channels: Channels C of a stream.
        config: Kind and sizes; None for the paper's mHC with four streams.
        sublayer: Index in depth order; HC's initial read takes stream `sublayer % n`.
        equal_streams: True if the streams are known to be equal, as after `expand`. mHC's res,
            whose rows sum to 1, then changes nothing, and its gradient is rounding noise, which
            Adam with the paper's epsilon of 1e-20 would turn into full steps: it gets no gradient.
        stacked: True if a Stack runs this connection and passes `previous_pre`.

    Raises:
        ConfigError: If a size is not an integer or too small, if `config` has another type, or for
            single_pass outside a Stack.

    Example:
        >>> import torch, manifold_hc as mhc
        >>> connection = mhc.Connection(8, mhc.ConnectionConfig(kind="mhc", streams=4))
        >>> x = mhc.functional.expand(torch.randn(2, 5, 8), 4)
        >>> connection(x, torch.nn.Linear(8, 8)).shape
        torch.Size([2, 5, 4, 8])
    """

    def __init__(
        self,
        channels: int,
        config: ConnectionConfig | None = None,
        sublayer: int = 0,
        *,
        equal_streams: bool = False,
        stacked: bool = False,
    ) -> None:
        """Create the maps with their initial values."""
        super().__init__()
        require_integer("Connection", "channels", channels, 1)
        require_integer("Connection", "sublayer", sublayer, 0)
        self.channels = channels
        self.config = require_config("Connection", config)
        if self.config.is_single_pass and not stacked:
            raise ConfigError(
                "Connection: single_pass reads with the pre of the sublayer before, which a lone "
                "connection does not have; use mhc.Stack"
            )
        self.sublayer = sublayer
        self.res_is_idle = self._rows_sum_to_one() and (equal_streams or self.config.n == 1)
        residual = self.config.kind == "residual"
        self.maps = (
            ResidualMaps()
            if residual
            else Maps(channels, self.config, sublayer, learn_res=not self.res_is_idle)
        )

    def forward(
        self, x: Float[Tensor, "*batch n C"], branch: Branch
    ) -> Float[Tensor, "*batch n C"]:
        """Read the streams, run the branch, mix and write.

        Args:
            x: Streams [..., n, C], from `functional.expand` or the connection before.
            branch: Callable [..., C] -> [..., C].

        Returns:
            The next streams [..., n, C], in x's dtype.

        Raises:
            ShapeError: If x does not hold this connection's streams, or the branch changes the
                shape of its input.
        """
        return self.run(x, branch).write()

    def run(
        self,
        source: Float[Tensor, "*batch n C"] | PendingWrite,
        branch: Branch,
        norm: Branch | None = None,
        input_norm: InputNorm | None = None,
        previous_pre: Float[Tensor, "*batch n"] | None = None,
    ) -> PendingWrite:
        """Run the sublayer up to its write; the entry of a Stack, without hooks.

        source: the streams, or the pending write of the sublayer before, which the fused kernel
        writes first. norm: module that the branch's input goes through. input_norm: the same norm
        if the fused kernel computes it. previous_pre: see `Maps.forward`.
        """
        streams = source.reading.x if isinstance(source, PendingWrite) else source
        if streams.shape[-2:] != (self.config.n, self.channels):
            raise ShapeError(
                f"Connection: x must be [..., {self.config.n}, {self.channels}] "
                f"but is {list(streams.shape)}; {self._repair(streams)}"
            )
        reading = self.maps(source, input_norm, previous_pre)
        y = branch(reading.u if norm is None else norm(reading.u))
        wanted = (*streams.shape[:-2], self.channels)
        if not isinstance(y, Tensor) or y.shape != wanted:
            returned = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ShapeError(
                f"Connection: the branch must return {list(wanted)} but returned {returned}; "
                "a branch must keep the shape of its input, one tensor"
            )
        if y.dtype not in (streams.dtype, torch.float32, torch.bfloat16):
            y = y.to(torch.promote_types(streams.dtype, torch.float32))
        return PendingWrite(reading, y, self.config)

    def _repair(self, x: Tensor) -> str:
        """Return the advice for streams of another shape."""
        n = self.config.n
        # With fewer dimensions [..., T, C] and [..., n, C] look alike.
        if x.dim() < 4 or x.shape[-1] != self.channels:
            return f"was expand() called after the embedding, with n = {n}?"
        always = ", as residual always has" if self.config.kind == "residual" else ""
        return (
            f"x has {x.shape[-2]} streams and the connection {n}{always}; "
            "give expand() and the connection the same n"
        )

    def reset_parameters(self) -> None:
        """Set the initial values listed at `Maps`: the connection starts as a residual one."""
        self.maps.reset_parameters()

    def _rows_sum_to_one(self) -> bool:
        """True if every row of res sums to 1 for any logits."""
        return (
            self.config.kind == "mhc"
            and constraints.CONSTRAINTS[self.config.constraint].rows_sum_to_one
        )

    def extra_repr(self) -> str:
        """Kind, streams and channels."""
        return f"{self.config.kind}, streams={self.config.n}, channels={self.channels}"


KNOWN_FORWARDS.update({kind: kind.forward for kind in (Connection, Maps, ResidualMaps)})
