"""A stack of connections: expands once, runs every sublayer, collapses once."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from manifold_hc import functional
from manifold_hc.connection import Branch, Connection, ConnectionConfig, LearnedExit
from manifold_hc.errors import ConfigError, ShapeError


class Stack(nn.Module):
    """All the connections of a network, in depth order.

    stack = Stack(channels, ConnectionConfig(kind="mhc", streams=4), sublayers=24)
    h = stack(h, branches)      h: [..., C]; branches: one callable per sublayer

    The exit is the mean of the streams for mHC, their sum for HC (normalise after it), and the
    learned exit with deepseek_v4 numerics.
    """

    def __init__(
        self, channels: int, config: ConnectionConfig | None = None, sublayers: int = 1
    ) -> None:
        """Raises ConfigError for sublayers < 1."""
        super().__init__()
        if sublayers < 1:
            raise ConfigError(f"Stack: sublayers must be at least 1 but is {sublayers}")
        self.config = config or ConnectionConfig()
        self.connections = nn.ModuleList(
            Connection(channels, self.config, sublayer, equal_streams=self._are_equal(sublayer))
            for sublayer in range(sublayers)
        )
        learned = self.config.exit == "learned"
        self.exit = LearnedExit(channels, self.config) if learned else None

    def _are_equal(self, sublayer: int) -> bool:
        """Streams start equal, and stay so where nothing writes a different share to each."""
        return sublayer == 0 or "post" in self.config.disable

    def forward(
        self, h: Float[Tensor, "*batch C"], branches: Sequence[Branch]
    ) -> Float[Tensor, "*batch C"]:
        """Embedding in, last hidden state out: [..., C] -> [..., C].

        Raises ShapeError when there is not one branch per sublayer.
        """
        if len(branches) != len(self.connections):
            raise ShapeError(
                f"Stack: branches must be {len(self.connections)}, one per sublayer, "
                f"but are {len(branches)}; attention and feed-forward count as one each"
            )
        x = functional.expand(h, self.config.n)
        for connection, branch in zip(self.connections, branches, strict=True):
            x = connection(x, branch)
        return self.collapse(x)

    def collapse(self, x: Float[Tensor, "*batch n C"]) -> Float[Tensor, "*batch C"]:
        """The exit alone: streams [..., n, C] -> [..., C]."""
        if self.exit is not None:
            h: Tensor = self.exit(x)
            return h
        mean = functional.collapse(x, backend=self.config.backend)
        return mean * self.config.n if self.config.exit == "sum" else mean
