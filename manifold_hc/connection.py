"""One sublayer's connection: residual, hyper-connection (HC) or manifold-constrained (mHC)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from manifold_hc import constraints, functional
from manifold_hc.autocast import is_autocast
from manifold_hc.constraints import ConstraintName
from manifold_hc.errors import ConfigError, ShapeError, require_at_least_one, require_number
from manifold_hc.functional import InputNorm, Reading
from manifold_hc.kernels import backends
from manifold_hc.kernels.fusion import is_fused
from manifold_hc.kernels.operators import FUSED_CONSTRAINTS
from manifold_hc.numerics import PRESETS, NumericsName, preset

Kind = Literal["residual", "hc", "mhc"]
Part = Literal["pre", "post", "res"]

Branch = Callable[[Tensor], Tensor]
"""A sublayer, its own norm inside unless the connection has it: [..., C] -> [..., C]."""

POST_SPREAD = 0.2
"""Half the range of mHC's initial write logits: different values, so that streams separate."""

SATURATED = 40.0
"""A logit whose sigmoid is 1 in float64."""


@dataclass(frozen=True)
class ConnectionConfig:
    """What joins a sublayer to the rest of the network."""

    kind: Kind = "mhc"
    """residual, hc (arXiv 2409.19606) or mhc (arXiv 2512.24880)."""
    streams: int = 4
    """Number n of residual streams, the papers' expansion rate; residual always has one."""
    dynamic: bool = True
    """Whether the coefficients depend on the token, or are plain parameters."""
    constraint: ConstraintName = "sinkhorn"
    """What mHC's mixing matrix is made by."""
    iterations: int = 20
    """Sinkhorn-Knopp iterations."""
    numerics: NumericsName = "paper"
    """mHC's preset of orders and epsilons."""
    norm_eps: float | None = None
    """Epsilon inside the RMS norm of the streams; the preset's when left out."""
    hc_eps: float | None = None
    """Epsilon of the deepseek_v4 preset, which alone has one; the preset's when left out."""
    alpha: float = 0.01
    """Initial gate of the dynamic part."""
    phi_std: float = 0.0
    """Standard deviation of the dynamic part's initial projection."""
    disable: tuple[Part, ...] = ()
    """Parts replaced by constants, as in the paper's Table 1: pre 1/n, post 1, res identity."""
    single_pass: bool = False
    """Whether a sublayer reads with the `pre` of the one before it (DeepSeek-V4.1); in a Stack."""
    backend: str = "auto"
    """Which implementation computes the connection."""

    def __post_init__(self) -> None:
        """Raise ConfigError for anything that cannot be built."""
        if self.kind not in ("residual", "hc", "mhc"):
            raise ConfigError(f"kind: must be residual, hc or mhc but is {self.kind!r}")
        require_at_least_one(self, "streams", "iterations")
        require_number(self, "phi_std", "norm_eps", "hc_eps")
        if not math.isfinite(self.alpha):
            raise ConfigError(f"alpha: must be finite but is {self.alpha}")
        if self.backend not in ("auto", *backends()):
            raise ConfigError(
                f"backend: must be one of auto, {', '.join(backends())} but is {self.backend!r}"
            )
        if unknown := [part for part in self.disable if part not in ("pre", "post", "res")]:
            raise ConfigError(f"disable: takes any of pre, post, res but has {unknown[0]!r}")
        if self.single_pass and self.kind != "mhc":
            raise ConfigError(
                f"single_pass: only mhc reads a sublayer late but kind is {self.kind}; leave it out"
            )
        constraints.constraint(self.constraint, self.streams)
        preset(self.numerics, norm_eps=self.norm_eps, hc_eps=self.hc_eps)

    @property
    def n(self) -> int:
        """Streams the network really carries: `streams`, or 1 for residual."""
        return 1 if self.kind == "residual" else self.streams

    @property
    def mixing(self) -> ConstraintName:
        """The constraint, or the identity where res is disabled."""
        return "identity" if "res" in self.disable else self.constraint

    @property
    def is_one_pass(self) -> bool:
        """Whether one operator makes a token's coefficients and reads with them."""
        fused = self.dynamic and self.mixing in FUSED_CONSTRAINTS
        return self.kind == "mhc" and fused and "pre" not in self.disable

    @property
    def exit(self) -> Literal["mean", "sum", "learned", "pre"]:
        """How the streams become one after the last sublayer; "pre": weighted by its pre."""
        if self.single_pass:
            return "pre"
        if self.kind == "hc":
            return "sum"
        if self.kind == "residual":
            return "mean"
        return PRESETS[self.numerics].exit


class WideModule(nn.Module):
    """A module whose own parameters never fall below float32.

    `.to(bfloat16)`, `.half()` and a checkpoint in half precision leave them in float32,
    `.double()` converts them.
    """

    def __init__(self) -> None:
        """Parameters are made by the subclasses, in `_wide()`."""
        super().__init__()
        self.register_load_state_dict_pre_hook(_widen_entries)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "WideModule":
        return cast("WideModule", super()._apply(lambda t: _at_least_float32(fn, t), recurse))


class Unwritten(NamedTuple):
    """A sublayer whose output is not in the streams yet.

    What a connection of a Stack hands to the next one, which makes the streams together with its
    own coefficients.
    """

    reading: Reading
    """The streams, and the coefficients that mix and write them."""
    y: Float[Tensor, "*batch C"]
    """The branch's output."""
    config: ConnectionConfig

    def write(self) -> Float[Tensor, "*batch n C"]:
        """The next streams [..., n, C]."""
        x, y, reading = self.reading.x, self.y, self.reading
        if self.config.kind == "residual":
            return (x + y.unsqueeze(-2)).to(x.dtype)
        return functional.write(
            x, y, reading.post, reading.res, self.config.backend, link=reading.link
        )


def crosses(source: Unwritten, config: ConnectionConfig, channels: int) -> bool:
    """Whether the streams are written together with the coefficients of the next connection.

    channels: those of x, which torch.compile may know as a symbol only.
    """
    x = source.reading.x
    size = (x.device.type, x.dtype, config.n, channels, config.single_pass)
    return config.is_one_pass and is_fused(*size)


class Maps(WideModule):
    """The learned maps of one connection: streams, written or not -> `functional.Reading`.

    Parameters `phi`, `alpha` and `bias`, packed as `functional.coefficients` and
    `functional.hc_coefficients` say. A forward hook here sees the streams and the coefficients that
    the forward pass uses; one that returns others replaces them, `u` included.
    """

    def __init__(
        self, channels: int, config: ConnectionConfig, sublayer: int, learn_res: bool = True
    ) -> None:
        """Initialise so that a network of these equals the pre-norm residual network."""
        super().__init__()
        self.config = config
        self.channels = channels
        self.learn_res = learn_res
        n = config.n
        initial = _hc_bias(n, sublayer) if config.kind == "hc" else _mhc_bias(n, config.mixing)
        self.bias = nn.Parameter(initial.to(_wide()))
        if config.dynamic:
            shape = (2 + n, channels) if config.kind == "hc" else (len(initial), n * channels)
            self.phi = nn.Parameter(torch.empty(shape, dtype=_wide()))
            self.alpha = nn.Parameter(torch.full((3,), config.alpha, dtype=_wide()))
            _fill(self.phi, config.phi_std)
        else:
            self.register_parameter("phi", None)
            self.register_parameter("alpha", None)

    def forward(
        self,
        source: Float[Tensor, "*batch n C"] | Unwritten,
        input_norm: InputNorm | None = None,
    ) -> Reading:
        """The coefficients of every token, and what is read from its streams.

        The norm of what was read is computed with it, if the streams are `Unwritten`.
        """
        config = self.config
        if isinstance(source, Unwritten) and crosses(source, config, self.channels):
            return self._without_disabled(self._boundary(source, input_norm))
        x = source.write() if isinstance(source, Unwritten) else source
        if config.is_one_pass and not config.single_pass:
            made = self._mhc(functional.coefficients_and_read, x, learn_res=self.learn_res)
            return self._without_disabled(made)
        if config.kind == "hc":
            pre, post, res = functional.hc_coefficients(
                x,
                self.phi,
                self.alpha,
                self.bias,
                norm_eps=1e-20 if config.norm_eps is None else config.norm_eps,
                backend=config.backend,
            )
        else:
            pre, post, res = self._mhc(functional.coefficients, x)
            res = res if self.learn_res else res.detach()
        if "pre" in config.disable:
            pre = torch.full_like(pre, 1 / config.n)
        weights = pre
        if config.single_pass:
            weights = source.reading.pre if isinstance(source, Unwritten) else first_read(pre)
        u = functional.read(x, weights, config.backend)
        return self._without_disabled(Reading(pre, post, res, u, x, weights, None))

    def _boundary(self, source: Unwritten, input_norm: InputNorm | None) -> Reading:
        before = source.reading
        return cast(
            Reading,
            self._mhc(
                functional.boundary,
                *(before.x, source.y, before.post, before.res),
                pre=before.pre if self.config.single_pass else None,
                input_norm=input_norm,
                link=before.link,
                learn_res=self.learn_res,
            ),
        )

    def _mhc(self, compute: Callable[..., Any], *streams: Any, **options: Any) -> Any:
        config = self.config
        return compute(
            *streams,
            self.phi,
            self.alpha,
            self.bias,
            iterations=config.iterations,
            constraint=config.mixing,
            numerics=config.numerics,
            norm_eps=config.norm_eps,
            hc_eps=config.hc_eps,
            backend=config.backend,
            **options,
        )

    def _without_disabled(self, reading: Reading) -> Reading:
        """post and res by their constants where they are disabled."""
        if "post" in self.config.disable:
            reading = reading._replace(post=torch.ones_like(reading.post))
        if "res" in self.config.disable and self.config.kind == "hc":
            reading = reading._replace(res=constraints.identity(self.config.n, reading.pre))
        return reading


def first_read(pre: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
    """What the first sublayer reads with where each reads with the one before it: stream 0."""
    weights = torch.zeros_like(pre)
    weights[..., 0] = 1
    return weights


class ResidualMaps(nn.Module):
    """The maps of a plain residual connection: one stream, every coefficient 1."""

    def forward(
        self,
        source: Float[Tensor, "*batch 1 C"] | Unwritten,
        input_norm: InputNorm | None = None,
    ) -> Reading:
        """Ones, as views of a single number, and the stream itself; no norm is computed with it."""
        x = source.write() if isinstance(source, Unwritten) else source
        wide = torch.promote_types(x.dtype, torch.float32)
        one = torch.ones((), dtype=wide, device=x.device)
        batch = x.shape[:-2]
        weight, res = one.expand(*batch, 1), one.expand(*batch, 1, 1)
        return Reading(weight, weight, res, x.squeeze(-2), x, weight, None)


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
    ) -> Float[Tensor, "*batch n C"] | Unwritten:
        """Read the streams, run the branch, mix and write: [..., n, C] -> [..., n, C].

        norm: what the branch's input goes through first, if that is not inside the branch. write:
        False leaves the write to the next connection, which takes it together with its own maps.
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
        reading = self.maps(x, input_norm)
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


class LearnedExit(WideModule):
    """DeepSeek-V4's exit: the streams summed with weights computed from them (`hc_head`).

    Starts as the mean.
    """

    def __init__(self, channels: int, config: ConnectionConfig) -> None:
        """`phi` [n, nC], `alpha` [1], `bias` [n]."""
        super().__init__()
        self.config = config
        n = config.n
        self.phi = nn.Parameter(torch.empty(n, n * channels, dtype=_wide()))
        self.alpha = nn.Parameter(torch.full((1,), config.alpha, dtype=_wide()))
        self.bias = nn.Parameter(torch.full((n,), _logit_of_mean(n), dtype=_wide()))
        _fill(self.phi, config.phi_std)

    def forward(self, x: Float[Tensor, "*batch n C"]) -> Float[Tensor, "*batch C"]:
        """[..., n, C] -> [..., C]."""
        config = self.config
        weights = functional.exit_coefficients(
            x,
            self.phi,
            self.alpha,
            self.bias,
            numerics=config.numerics,
            norm_eps=config.norm_eps,
            hc_eps=config.hc_eps,
            backend=config.backend,
        )
        return functional.collapse(x, weights, config.backend)


def _logit_of_mean(n: int) -> float:
    """The logit of 1/n."""
    return -math.log(max(n - 1, math.exp(-SATURATED)))


def _mhc_bias(n: int, constraint: str) -> Tensor:
    """pre = 1/n, post different for every stream with mean 1, res near the identity.

    The mean of the streams then moves exactly as the residual network's state.
    """
    pre = torch.full((n,), _logit_of_mean(n))
    position = (2 * torch.arange(n) - (n - 1)) / max(n - 1, 1)
    return torch.cat([pre, POST_SPREAD * position, constraints.CONSTRAINTS[constraint].initial(n)])


def _hc_bias(n: int, sublayer: int) -> Tensor:
    """Read stream `sublayer % n`, write to all, mix nothing (arXiv 2409.19606, equation 14)."""
    pre = torch.zeros(n)
    pre[sublayer % n] = 1
    return torch.cat([pre, torch.ones(n), torch.eye(n).flatten()])


def _fill(phi: Tensor, std: float) -> None:
    # Zero draws nothing, so that all kinds of connection leave the branches the same random state.
    with torch.no_grad():
        phi.normal_(0, std) if std else phi.zero_()


def _wide() -> torch.dtype:
    """float32, or float64 where that is torch's default."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


def _at_least_float32(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """`fn`, the conversion that a module passes down, without its fall below float32."""
    result: Any = fn(tensor)
    if result.is_floating_point() and result.dtype.itemsize < 4:
        return tensor.to(device=result.device, dtype=torch.float32)
    return cast(Tensor, result)


def _widen_entries(
    module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *rest: object
) -> None:
    """Half-precision entries of a checkpoint, which `assign=True` would put in as they are."""
    for name, _ in module.named_parameters(prefix=prefix.removesuffix("."), recurse=False):
        if name in state_dict:
            state_dict[name] = _at_least_float32(lambda tensor: tensor, state_dict[name])
