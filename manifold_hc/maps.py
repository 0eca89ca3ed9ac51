"""The learned maps of a connection: streams, written or not, to coefficients and what is read."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from manifold_hc import constraints, functional
from manifold_hc.config import ConnectionConfig, Part
from manifold_hc.functional import InputNorm, Reading
from manifold_hc.kernels.fusion import is_fused
from manifold_hc.precision import WideModule, wide_dtype

POST_SPREAD = 0.2
"""Half the range of mHC's initial write logits: different values, so that streams separate."""

SATURATED = 40.0
"""A logit whose sigmoid is 1 in float64."""


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
    `functional.hc_coefficients` say, in float32 or float64. Initial values (`reset_parameters`):

    - `phi`: 0, or normal with standard deviation `phi_std`; `alpha`: `config.alpha`, 0.01.
    - mhc's `bias`: pre -ln(n - 1), so that pre = 1/n (40 for n = 1); post 0.2 linspace(-1, 1, n),
      so that the posts differ and average to 1; res 0 on the diagonal and -5 off it. With the
      constraints permutation and kronecker, 0 for the identity and -5 for the others; with none, I.
    - hc's `bias`: pre one-hot at stream `sublayer % n`, post 1, res I.

    A forward hook here sees the streams and the coefficients that the forward pass uses; one that
    returns others replaces them, `u` included.
    """

    def __init__(
        self, channels: int, config: ConnectionConfig, sublayer: int, learn_res: bool = True
    ) -> None:
        """Initialise so that a network of these equals the pre-norm residual network."""
        super().__init__()
        self.config = config
        self.channels = channels
        self.sublayer = sublayer
        self.learn_res = learn_res
        n, is_hc, wide = config.n, config.kind == "hc", wide_dtype()
        k = n * n if is_hc else constraints.CONSTRAINTS[config.mixing].size(n)
        self.bias = nn.Parameter(torch.empty(2 * n + k, dtype=wide))
        if config.dynamic:
            shape = (2 + n, channels) if is_hc else (2 * n + k, n * channels)
            self.phi = nn.Parameter(torch.empty(shape, dtype=wide))
            self.alpha = nn.Parameter(torch.empty(3, dtype=wide))
        else:
            self.register_parameter("phi", None)
            self.register_parameter("alpha", None)
        self.requires_grad_(bool(self._live_parts()))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the initial values that the class names; only a `phi_std` draws random numbers."""
        n, mixing = self.config.n, self.config.mixing
        dtype, device = self.bias.dtype, self.bias.device
        if self.config.kind == "hc":
            copy_whole(self.bias, _hc_bias(n, self.sublayer, dtype, device))
        else:
            copy_whole(self.bias, _mhc_bias(n, mixing, dtype, device))
        if self.phi is not None:
            _fill(self.phi, self.config.phi_std)
            self.alpha.fill_(self.config.alpha)

    def forward(
        self,
        source: Float[Tensor, "*batch n C"] | Unwritten,
        input_norm: InputNorm | None = None,
        before: Float[Tensor, "*batch n"] | None = None,
    ) -> Reading:
        """The coefficients of every token, and what is read from its streams.

        The norm of what was read is computed with it, if the streams are `Unwritten`. before: what
        single_pass reads written streams with, the pre of the sublayer before; None for the first.
        """
        self._require_wide()
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
            learns = self.learn_res and config.mixing != "identity"
            res = res if learns else res.detach()
        if "pre" in config.disable:
            pre = torch.full_like(pre, 1 / config.n)
        weights = pre
        if config.single_pass:
            before = source.reading.pre if isinstance(source, Unwritten) else before
            weights = first_read(pre) if before is None else before
        u = functional.read(x, weights, config.backend)
        return self._without_disabled(Reading(pre, post, res, u, x, weights, None))

    def extra_repr(self) -> str:
        """Kind, sizes, what makes the coefficients, and the parameters' shapes."""
        config, parts = self.config, [_sizes(self.config, self.channels)]
        if config.kind == "mhc":
            parts.append(f"constraint={config.mixing}, numerics={config.numerics}")
        parts.append(f"dynamic={config.dynamic}")
        if config.disable:
            parts.append(f"disable={','.join(config.disable)}")
        return ", ".join([*parts, *_shapes(self)])

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

    def _live_parts(self) -> set[Part]:
        """The parts that these parameters make and the streams use.

        Without any, no parameter would have a gradient: Adam would hold no moments for it, and
        DistributedDataParallel would wait for it. So none is trainable.
        """
        live: set[Part] = {"pre", "post"}
        if self.learn_res and self.config.mixing != "identity":
            live.add("res")
        return live - set(self.config.disable)

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

    def reset_parameters(self) -> None:
        """Nothing to set: there are no parameters."""

    def extra_repr(self) -> str:
        """One stream and no parameters."""
        return "residual, streams=1"

    def forward(
        self,
        source: Float[Tensor, "*batch 1 C"] | Unwritten,
        input_norm: InputNorm | None = None,
        before: Tensor | None = None,
    ) -> Reading:
        """Ones, as views of a single number, and the stream itself; no norm is computed with it."""
        x = source.write() if isinstance(source, Unwritten) else source
        wide = torch.promote_types(x.dtype, torch.float32)
        one = torch.ones((), dtype=wide, device=x.device)
        batch = x.shape[:-2]
        weight, res = one.expand(*batch, 1), one.expand(*batch, 1, 1)
        return Reading(weight, weight, res, x.squeeze(-2), x, weight, None)


class LearnedExit(WideModule):
    """DeepSeek-V4's exit: the streams summed with weights computed from them (`hc_head`).

    Starts as the mean: `phi` 0, or normal with standard deviation `phi_std`; `alpha`
    `config.alpha`; `bias` -ln(n - 1), whose sigmoid is 1/n.
    """

    def __init__(self, channels: int, config: ConnectionConfig) -> None:
        """`phi` [n, nC], `alpha` [1], `bias` [n]."""
        super().__init__()
        self.config = config
        self.channels = channels
        n, wide = config.n, wide_dtype()
        self.phi = nn.Parameter(torch.empty(n, n * channels, dtype=wide))
        self.alpha = nn.Parameter(torch.empty(1, dtype=wide))
        self.bias = nn.Parameter(torch.empty(n, dtype=wide))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the initial values that the class names."""
        _fill(self.phi, self.config.phi_std)
        self.alpha.fill_(self.config.alpha)
        self.bias.fill_(_logit_of_mean(self.config.n))

    def extra_repr(self) -> str:
        """Sizes, numerics and the parameters' shapes."""
        parts = [_sizes(self.config, self.channels), f"numerics={self.config.numerics}"]
        return ", ".join([*parts, *_shapes(self)])

    def forward(self, x: Float[Tensor, "*batch n C"]) -> Float[Tensor, "*batch C"]:
        """[..., n, C] -> [..., C]."""
        self._require_wide()
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


def _sizes(config: ConnectionConfig, channels: int) -> str:
    return f"{config.kind}, streams={config.n}, channels={channels}"


def _shapes(module: nn.Module) -> list[str]:
    return [f"{name}={list(p.shape)}" for name, p in module.named_parameters(recurse=False)]


def _logit_of_mean(n: int) -> float:
    """The logit of 1/n."""
    return -math.log(max(n - 1, math.exp(-SATURATED)))


def _mhc_bias(n: int, constraint: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """pre = 1/n, post different for every stream with mean 1, res near the identity.

    The mean of the streams then moves exactly as the residual network's state.
    """
    pre = torch.full((n,), _logit_of_mean(n), dtype=dtype, device=device)
    position = (2 * torch.arange(n, dtype=dtype, device=device) - (n - 1)) / max(n - 1, 1)
    initial = constraints.CONSTRAINTS[constraint].initial(n)
    res = torch.tensor(initial, dtype=dtype, device=device)
    return torch.cat([pre, POST_SPREAD * position, res])


def _hc_bias(n: int, sublayer: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Read stream `sublayer % n`, write to all, mix nothing (arXiv 2409.19606, equation 14)."""
    eye = torch.eye(n, dtype=dtype, device=device)
    return torch.cat([eye[sublayer % n], torch.ones_like(eye[0]), eye.flatten()])


def copy_whole(parameter: Tensor, values: Tensor) -> None:
    """Copy values, the same in every process, into a parameter that FSDP2 may have sharded."""
    if (mesh := getattr(parameter, "device_mesh", None)) is not None:
        from torch.distributed.tensor import DTensor, distribute_tensor

        placements = cast(DTensor, parameter).placements
        values = distribute_tensor(values, mesh, placements, src_data_rank=None)
    parameter.copy_(values)


def _fill(phi: Tensor, std: float) -> None:
    # Zero draws nothing, so that all kinds of connection leave the branches the same random state.
    with torch.no_grad():
        phi.normal_(0, std) if std else phi.zero_()
