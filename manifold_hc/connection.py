"""One sublayer's connection: residual, hyper-connection (HC) or manifold-constrained (mHC)."""

from collections.abc import Callable
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from manifold_hc import constraints
from manifold_hc.autocast import is_autocast
from manifold_hc.config import ConnectionConfig
from manifold_hc.errors import ConfigError, ShapeError
from manifold_hc.functional import InputNorm
from manifold_hc.maps import Maps, ResidualMaps, Unwritten, crosses

Branch = Callable[[Tensor], Tensor]
"""A sublayer, its own norm inside unless the connection has it: [..., C] -> [..., C]."""


def is_watched(module: nn.Module) -> bool:
    """Whether hooks see it run, its own or those on all modules."""
    everywhere = nn.modules.module
    return any(
        (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
            everywhere._global_forward_hooks,
            everywhere._global_forward_pre_hooks,
            everywhere._global_backward_hooks,
            everywhere._global_backward_pre_hooks,
        )
    )


def known_norm(norm: Branch, x: Tensor) -> InputNorm | None:
    """The norm as a kernel takes it, if it is one that a kernel knows.

    That is an RMSNorm of torch's over C, in x's own dtype and with an epsilon, or one that says so
    by `input_norm(dtype)`; and nobody watches it run.
    """
    if not isinstance(norm, nn.RMSNorm) or norm.normalized_shape != x.shape[-1:]:
        return None
    if is_watched(norm):
        return None
    if callable(known := getattr(norm, "input_norm", None)):
        return cast(InputNorm, known(x.dtype))
    plain = type(norm) is nn.RMSNorm and not is_autocast(x.device.type)
    if not plain or norm.eps is None or norm.weight is None or norm.weight.dtype != x.dtype:
        return None
    return InputNorm(norm.weight.to(torch.promote_types(x.dtype, torch.float32)), norm.eps)


class Connection(nn.Module):
    """One sublayer's connection; wraps any branch.

    connection = Connection(channels, ConnectionConfig(kind="mhc", streams=4), sublayer=index)
    x = connection(x, branch)      x: [..., n, C], from `functional.expand` or the one before

    sublayer: the index in depth order; HC's first read takes stream `sublayer % n`.
    stacked: whether a Stack runs it, which knows its neighbours.
    equal_streams: whether the streams are known to be equal, as after `expand`. Then mHC's res,
    whose rows sum to 1, changes nothing, and its gradient is rounding noise, which Adam with the
    paper's epsilon of 1e-20 would turn into full steps: it gets none.
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
        """Raises ConfigError for channels < 1, a negative sublayer, or single_pass on its own."""
        super().__init__()
        if channels < 1:
            raise ConfigError(f"Connection: channels must be at least 1 but is {channels}")
        if sublayer < 0:
            raise ConfigError(f"Connection: sublayer must not be negative but is {sublayer}")
        self.channels = channels
        self.config = config or ConnectionConfig()
        if self.config.single_pass and not stacked:
            raise ConfigError(
                "Connection: single_pass reads with the pre of the sublayer before, which a lone "
                "connection does not have; use mhc.Stack"
            )
        self.sublayer = sublayer
        self.res_is_idle = self._mixes_to_one() and (equal_streams or self.config.n == 1)
        residual = self.config.kind == "residual"
        self.maps = (
            ResidualMaps()
            if residual
            else Maps(channels, self.config, sublayer, learn_res=not self.res_is_idle)
        )

    def forward(
        self,
        x: Float[Tensor, "*batch n C"] | Unwritten,
        branch: Branch,
        norm: Branch | None = None,
        *,
        write: bool = True,
        before: Float[Tensor, "*batch n"] | None = None,
    ) -> Float[Tensor, "*batch n C"] | Unwritten:
        """Read the streams, run the branch, mix and write: [..., n, C] -> [..., n, C].

        norm: what the branch's input goes through first, if that is not inside the branch. write:
        False leaves the write to the next connection, which takes it together with its own maps.
        before: with single_pass, the pre of the sublayer before, where x is written.
        Raises ShapeError when x does not hold this connection's streams, or when the branch
        changes the shape of its input.
        """
        streams = x.reading.x if isinstance(x, Unwritten) else x
        if streams.shape[-2:] != (self.config.n, self.channels):
            raise ShapeError(
                f"Connection: x must be [..., {self.config.n}, {self.channels}] "
                f"but is {list(streams.shape)}; was expand() called after the embedding?"
            )
        input_norm = self.fused(x, norm)
        reading = self.maps(x, input_norm, before)
        u = reading.u if norm is None or input_norm is not None else norm(reading.u)
        y = branch(u)
        wanted = (*streams.shape[:-2], self.channels)
        if not isinstance(y, Tensor) or y.shape != wanted:
            returned = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ShapeError(
                f"Connection: the branch must return {list(wanted)} but returned {returned}; "
                "a branch must keep the shape of its input, one tensor"
            )
        if y.dtype not in (streams.dtype, torch.float32, torch.bfloat16):
            y = y.to(torch.promote_types(streams.dtype, torch.float32))
        unwritten = Unwritten(reading, y, self.config)
        return unwritten.write() if write else unwritten

    def fused(self, x: Tensor | Unwritten, norm: Branch | None) -> InputNorm | None:
        """The norm as it is computed with the streams, if it is."""
        if norm is None or not isinstance(x, Unwritten):
            return None
        if not crosses(x, self.config, self.channels):
            return None
        return known_norm(norm, x.reading.x)

    def _mixes_to_one(self) -> bool:
        """Whether the rows of res sum to 1 whatever its logits are."""
        return (
            self.config.kind == "mhc"
            and constraints.CONSTRAINTS[self.config.constraint].rows_sum_to_one
        )

    def extra_repr(self) -> str:
        """Kind, streams and channels."""
        return f"{self.config.kind}, streams={self.config.n}, channels={self.channels}"
