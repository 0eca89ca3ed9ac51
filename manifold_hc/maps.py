"""Learned maps of a connection: from the streams to the coefficients and the sublayer's input."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from manifold_hc import constraints, functional
from manifold_hc.config import ConnectionConfig, Part
from manifold_hc.functional import InputNorm, Reading
from manifold_hc.precision import WideModule, wide_dtype

POST_SPREAD = 0.2
"""Half the range of mHC's initial write logits: different values, so that streams separate."""

SATURATED = 40.0
"""A logit whose sigmoid is 1 in float64."""


class PendingWrite(NamedTuple):
    """Output of a sublayer that is not in the streams yet.

    A Stack passes it to the next sublayer, whose fused kernel writes the streams and computes the
    next coefficients from them in one pass; `write` writes the streams alone.
    """

    reading: Reading
    """Streams before the write, with the coefficients that mix and write them."""
    y: Float[Tensor, "*batch C"]
    """Output of the branch."""
    config: ConnectionConfig

    def write(self) -> Float[Tensor, "*batch n C"]:
        """Return the next streams `res x + post y` [..., n, C]."""
        x, y, reading = self.reading.x, self.y, self.reading
        if self.config.kind == "residual":
            return (x + y.unsqueeze(-2)).to(x.dtype)
        return functional.write(
            x, y, reading.post, reading.res, self.config.backend, link=reading.link
        )


class Maps(WideModule):
    """Learned maps of one connection: streams -> `functional.Reading`.

    Parameters `phi`, `alpha` and `bias`, packed as `functional.coefficients` and
    `functional.hc_coefficients` say, in float32 or float64. Initial values (`reset_parameters`):

    - `phi`: 0, or normal with standard deviation `phi_std`; `alpha`: `config.alpha`, 0.01.
    - mhc's `bias`: pre -ln(n - 1), so that pre = 1/n (40 for n = 1); post 0.2 linspace(-1, 1, n),
      so that the posts differ and average to 1; res 0 on the diagonal and -5 off it. With the
      constraints permutation and kronecker, 0 for the identity and -5 for the others; with none, I.
    - hc's `bias`: pre one-hot at stream `sublayer % n`, post 1, res I.

    A forward hook on this module sees the streams and coefficients of the forward pass, fused or
    not; a hook that returns another Reading replaces them, `u` included.
    """

    def __init__(
        self, channels: int, config: ConnectionConfig, sublayer: int, learn_res: bool = True
    ) -> None:
        """Initialise so that a network of such connections equals the pre-norm residual network.

        learn_res: False if `res` gets no gradient, because mixing equal streams changes nothing.
        """
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
        self.requires_grad_(bool(self._learned_coefficients()))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the initial values listed above; random numbers are drawn only if `phi_std` > 0."""
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
        source: Float[Tensor, "*batch n C"] | PendingWrite,
        input_norm: InputNorm | None = None,
        previous_pre: Float[Tensor, "*batch n"] | None = None,
    ) -> Reading:
        """Compute the coefficients of every token, and read the sublayer's input with them.

        source: the streams, or a pending write that the fused kernel writes first.
        input_norm: norm of the input that the fused kernel computes too.
        previous_pre: with single_pass the `pre` of the sublayer before, which this one reads with;
        None for the first sublayer, which reads stream 0.
        """
        self._require_wide()
        config = self.config
        if isinstance(source, PendingWrite):
            return self._replace_disabled(self._fused(source, input_norm, previous_pre))
        if config.reads_in_kernel and not config.is_single_pass:
            made = self._mhc(functional.coefficients_and_read, source, learn_res=self.learn_res)
            return self._replace_disabled(made)
        pre, post, res = self._coefficients(source)
        if "pre" in config.disable:
            pre = torch.full_like(pre, 1 / config.n)
        read_weights = pre
        if config.is_single_pass:
            read_weights = first_read_weights(pre) if previous_pre is None else previous_pre
        u = functional.read(source, read_weights, config.backend)
        return self._replace_disabled(Reading(pre, post, res, u, source, read_weights, None))

    def extra_repr(self) -> str:
        """Kind, sizes, constraint and numerics, and the parameters' shapes."""
        config, parts = self.config, [_sizes(self.config, self.channels)]
        if config.kind == "mhc":
            parts.append(f"constraint={config.mixing}, numerics={config.numerics}")
        parts.append(f"dynamic={config.dynamic}")
        if config.disable:
            parts.append(f"disable={','.join(config.disable)}")
        return ", ".join([*parts, *_shapes(self)])

    def _fused(
        self,
        source: PendingWrite,
        input_norm: InputNorm | None,
        previous_pre: Float[Tensor, "*batch n"] | None,
    ) -> Reading:
        before = source.reading
        return cast(
            Reading,
            self._mhc(
                functional.boundary,
                before.x,
                source.y,
                before.post,
                before.res,
                pre=previous_pre,
                input_norm=input_norm,
                link=before.link,
                learn_res=self.learn_res,
            ),
        )

    def _coefficients(self, x: Float[Tensor, "*batch n C"]) -> tuple[Tensor, Tensor, Tensor]:
        config = self.config
        if config.kind == "hc":
            return functional.hc_coefficients(
                x,
                self.phi,
                self.alpha,
                self.bias,
                norm_eps=1e-20 if config.norm_eps is None else config.norm_eps,
                backend=config.backend,
            )
        pre, post, res = self._mhc(functional.coefficients, x)
        learns = self.learn_res and config.mixing != "identity"
        return pre, post, res if learns else res.detach()

    def _learned_coefficients(self) -> set[Part]:
        """Coefficients that these parameters produce and the forward pass uses.

        If there are none, no parameter gets a gradient: Adam would hold no moments for it, and
        DistributedDataParallel would wait for it. So none is trainable.
        """
        learned: set[Part] = {"pre", "post"}
        if self.learn_res and self.config.mixing != "identity":
            learned.add("res")
        return learned - set(self.config.disable)

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

    def _replace_disabled(self, reading: Reading) -> Reading:
        """Replace `post` and `res` by their constants if they are disabled."""
        if "post" in self.config.disable:
            reading = reading._replace(post=torch.ones_like(reading.post))
        if "res" in self.config.disable and self.config.kind == "hc":
            reading = reading._replace(res=constraints.identity(self.config.n, reading.pre))
        return reading


def first_read_weights(pre: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
    """Single-pass read weights of the first sublayer: one-hot on stream 0."""
    weights = torch.zeros_like(pre)
    weights[..., 0] = 1
    return weights


class ResidualMaps(nn.Module):
    """Maps of a plain residual connection: one stream, every coefficient 1, no parameters."""

    def reset_parameters(self) -> None:
        """Do nothing: there are no parameters."""

    def extra_repr(self) -> str:
        """One stream and no parameters."""
        return "residual, streams=1"

    def forward(
        self,
        source: Float[Tensor, "*batch 1 C"],
        input_norm: InputNorm | None = None,
        previous_pre: Tensor | None = None,
    ) -> Reading:
        """Return coefficients of 1, as views of a single number, and the stream as input."""
        wide = torch.promote_types(source.dtype, torch.float32)
        one = torch.ones((), dtype=wide, device=source.device)
        batch = source.shape[:-2]
        weight, res = one.expand(*batch, 1), one.expand(*batch, 1, 1)
        return Reading(weight, weight, res, source.squeeze(-2), source, weight, None)


class LearnedExit(WideModule):
    """DeepSeek-V4's exit: sum of the streams, weighted by a map of them (`hc_head`).

    Starts as the mean: `phi` 0, or normal with standard deviation `phi_std`; `alpha`
    `config.alpha`; `bias` -ln(n - 1), whose sigmoid is 1/n.
    """

    def __init__(self, channels: int, config: ConnectionConfig) -> None:
        """Create `phi` [n, nC], `alpha` [1] and `bias` [n]."""
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
        """Set the initial values listed above."""
        _fill(self.phi, self.config.phi_std)
        self.alpha.fill_(self.config.alpha)
        self.bias.fill_(_logit_of_mean(self.config.n))

    def extra_repr(self) -> str:
        """Sizes, numerics and the parameters' shapes."""
        parts = [_sizes(self.config, self.channels), f"numerics={self.config.numerics}"]
        return ", ".join([*parts, *_shapes(self)])

    def forward(self, x: Float[Tensor, "*batch n C"]) -> Float[Tensor, "*batch C"]:
        """Reduce the streams [..., n, C] to the last hidden state [..., C]."""
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
    """Logit of 1/n."""
    return -math.log(max(n - 1, math.exp(-SATURATED)))


def _mhc_bias(n: int, constraint: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Initial mHC bias: pre = 1/n, post of mean 1 that differs by stream, res near the identity.

    The mean of the streams then follows the residual network's hidden state exactly.
    """
    pre = torch.full((n,), _logit_of_mean(n), dtype=dtype, device=device)
    position = (2 * torch.arange(n, dtype=dtype, device=device) - (n - 1)) / max(n - 1, 1)
    initial = constraints.CONSTRAINTS[constraint].initial(n)
    res = torch.tensor(initial, dtype=dtype, device=device)
    return torch.cat([pre, POST_SPREAD * position, res])


def _hc_bias(n: int, sublayer: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Initial HC bias: read stream `sublayer % n`, write to all, no mixing (HC, equation 14)."""
    eye = torch.eye(n, dtype=dtype, device=device)
    return torch.cat([eye[sublayer % n], torch.ones_like(eye[0]), eye.flatten()])


def copy_whole(parameter: Tensor, values: Tensor) -> None:
    """Copy values that are equal on all ranks into a parameter that FSDP2 may have sharded."""
    if (mesh := getattr(parameter, "device_mesh", None)) is not None:
        from torch.distributed.tensor import DTensor, distribute_tensor

        placements = cast(DTensor, parameter).placements
        values = distribute_tensor(values, mesh, placements, src_data_rank=None)
    parameter.copy_(values)


def _fill(phi: Tensor, std: float) -> None:
    # A standard deviation of 0 draws no numbers, so that branches initialised later get the same
    # random numbers with every kind of connection.
    with torch.no_grad():
        phi.normal_(0, std) if std else phi.zero_()
