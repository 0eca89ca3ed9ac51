"""One sublayer's connection: residual, hyper-connection (HC) or manifold-constrained (mHC)."""

from collections.abc import Callable
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from manifold_hc import constraints
from manifold_hc.config import ConnectionConfig, require_config
from manifold_hc.errors import ConfigError, ShapeError, require_integer
from manifold_hc.functional import InputNorm
from manifold_hc.maps import Maps, ResidualMaps, Unwritten, crosses
from manifold_hc.precision import is_autocast

Branch = Callable[[Tensor], Tensor]
"""A sublayer, its own norm inside unless the connection has it: [..., C] -> [..., C]."""


_CALL, _CALL_IMPL = nn.Module.__call__, nn.Module._call_impl

KNOWN_FORWARDS: dict[type, Callable[..., Any]] = {}
"""The forwards that kernels and recompute stand in for, as their classes were written."""


def is_written(kind: type, forward: Callable[..., Any]) -> bool:
    """True if the class body itself defines this forward: neither patched in later nor wrapped."""
    code = getattr(forward, "__code__", None)
    return (
        code is not None
        and code.co_qualname == f"{kind.__qualname__}.forward"
        and forward.__module__ == kind.__module__
    )


def known_forward(kind: type) -> Callable[..., Any] | None:
    """The forward that kernels and recompute may stand in for, by class.

    Either the one in `KNOWN_FORWARDS`, or the one of the class that defines `input_norm`, which
    promises what its forward computes. A subclass that overrides forward alone has none.
    """
    for base in kind.__mro__:
        if base in KNOWN_FORWARDS:
            return KNOWN_FORWARDS[base]
        if "input_norm" in vars(base):
            made: Callable[..., Any] = cast(type[nn.Module], base).forward
            return made if any(is_written(owner, made) for owner in base.__mro__) else None
    return None


def is_altered(module: nn.Module) -> bool:
    """True if a call runs something besides its class's forward.

    That is a replaced or compiled forward, hooks of its own or on all modules, or a
    parametrization of its weights (`torch.nn.utils.parametrize`).
    """
    everywhere, kind = nn.modules.module, type(module)
    return any(
        (
            kind.__call__ is not _CALL,
            # Of the instance, not of its __dict__, whose changes torch.compile does not notice.
            getattr(module._call_impl, "__func__", None) is not _CALL_IMPL,
            getattr(module.forward, "__func__", None) is not kind.forward,
            module._compiled_call_impl is not None,
            "parametrizations" in module._modules,
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


def runs_known_forward(module: nn.Module) -> bool:
    """True if a call of the module runs `known_forward` and nothing else.

    The one condition under which a kernel may compute the module, and backward may run it again.
    """
    known = known_forward(type(module))
    return known is not None and type(module).forward is known and not is_altered(module)


def known_norm(norm: Branch, x: Tensor) -> InputNorm | None:
    """The norm as a kernel takes it, or None where the norm itself must run.

    A kernel takes an RMSNorm over C: torch's in x's own dtype and with an epsilon, or one with a
    method `input_norm(dtype)`. A norm whose forward is replaced, hooked or compiled runs itself.
    """
    if not isinstance(norm, nn.RMSNorm) or norm.normalized_shape != x.shape[-1:]:
        return None
    if not runs_known_forward(norm):
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
        """Raises ConfigError for sizes that are no integers or too small, for a config of another
        type, and for single_pass outside of a Stack.
        """
        super().__init__()
        require_integer("Connection", "channels", channels, 1)
        require_integer("Connection", "sublayer", sublayer, 0)
        self.channels = channels
        self.config = require_config("Connection", config)
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
                f"but is {list(streams.shape)}; {self._repair(streams)}"
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

    def _repair(self, x: Tensor) -> str:
        """What to do about streams of another shape."""
        n = self.config.n
        # With fewer dimensions [..., T, C] and [..., n, C] look alike.
        if x.dim() < 4 or x.shape[-1] != self.channels:
            return f"was expand() called after the embedding, with n = {n}?"
        always = ", as residual always has" if self.config.kind == "residual" else ""
        return (
            f"x has {x.shape[-2]} streams and the connection {n}{always}; "
            "give expand() and the connection the same n"
        )

    def fused(self, x: Tensor | Unwritten, norm: Branch | None) -> InputNorm | None:
        """The norm as it is computed with the streams, if it is."""
        if norm is None or not isinstance(x, Unwritten):
            return None
        if not crosses(x, self.config, self.channels):
            return None
        return known_norm(norm, x.reading.x)

    def reset_parameters(self) -> None:
        """Set the initial values that `Maps` names: the connection starts as a residual one."""
        self.maps.reset_parameters()

    def _mixes_to_one(self) -> bool:
        """Whether the rows of res sum to 1 whatever its logits are."""
        return (
            self.config.kind == "mhc"
            and constraints.CONSTRAINTS[self.config.constraint].rows_sum_to_one
        )

    def extra_repr(self) -> str:
        """Kind, streams and channels."""
        return f"{self.config.kind}, streams={self.config.n}, channels={self.channels}"


KNOWN_FORWARDS.update({kind: kind.forward for kind in (Connection, Maps, ResidualMaps)})
KNOWN_FORWARDS.update(
    {kind: kind.forward for kind in (nn.RMSNorm, nn.LayerNorm) if is_written(kind, kind.forward)}
)
