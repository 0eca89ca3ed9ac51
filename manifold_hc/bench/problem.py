"""Size of one connection, its random inputs, and the reference that gives the right results."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from manifold_hc.config import ConnectionConfig
from manifold_hc.errors import ConfigError, require_at_least_one
from manifold_hc.numerics import NumericsName, preset
from manifold_hc.reference import coefficients, read, write

DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}
"""Dtypes of the streams, by name."""


class Inputs(NamedTuple):
    """Inputs of every implementation, and the gradients of its outputs.

    R = n*n + 2n rows, N tokens in one sequence.
    """

    x: Float[Tensor, "1 N n C"]
    y: Float[Tensor, "1 N C"]
    """Output of the branch; given, so that only the connection is timed."""
    phi: Float[Tensor, "R nC"]
    alpha: Float[Tensor, "3"]
    bias: Float[Tensor, " R"]
    grad_u: Float[Tensor, "1 N C"]
    grad_new: Float[Tensor, "1 N n C"]


@dataclass(frozen=True)
class Problem:
    """Size, dtype and device of one connection."""

    tokens: int = 2048
    """Tokens N of the one sequence."""
    streams: int = 4
    """Streams n."""
    channels: int = 1280
    """Channels C."""
    dtype: str = "float32"
    """Dtype of the streams; coefficients are float32."""
    numerics: NumericsName = "paper"
    """Preset of our connection; a peer keeps its own."""
    device: str = "cpu"
    """Device of all tensors."""

    def __post_init__(self) -> None:
        """Raise ConfigError for a size below 1, or an unknown dtype or preset."""
        require_at_least_one(self, "tokens", "streams", "channels")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype: must be one of {', '.join(DTYPES)} but is {self.dtype!r}")
        preset(self.numerics)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Dtype of the streams."""
        return DTYPES[self.dtype]

    @property
    def stream_bytes(self) -> int:
        """Bytes of one streams tensor: all tokens, n streams."""
        return self.tokens * self.streams * self.channels * self.torch_dtype.itemsize

    @property
    def bound_elements(self) -> tuple[int, int]:
        """Elements per token and channel that forward and backward must read and write.

        Source: arXiv 2512.24880, section 4.3. Forward, 4n + 2: the coefficients read x (n); read
        reads x and writes u (n + 1); write reads x and y and writes x' (2n + 1). Backward, 5n + 3:
        the write's gradients read x, y and the gradient of x' and write y's (2n + 2); the rest
        reads x, the gradients of x' and of u and writes x's (3n + 1).
        """
        return 4 * self.streams + 2, 5 * self.streams + 3

    @property
    def bound_bytes(self) -> tuple[int, int]:
        """Bytes that forward and backward must move, without the coefficients'."""
        forward, backward = self.bound_elements
        one = self.stream_bytes // self.streams
        return forward * one, backward * one

    @property
    def size(self) -> str:
        """The three sizes as titles show them."""
        return f"{self.tokens} tokens, n = {self.streams}, C = {self.channels}"

    def connection(self, backend: str = "auto", **options: Any) -> ConnectionConfig:
        """Return the configuration of our connection; `options` are further fields."""
        return ConnectionConfig(
            streams=self.streams, numerics=self.numerics, backend=backend, **options
        )

    def random(self, *shape: int) -> Tensor:
        """Draw [1, N, *shape] in the streams' dtype from torch's random state."""
        return torch.randn(1, self.tokens, *shape, device=self.device).to(self.torch_dtype)

    def inputs(self, seed: int = 0) -> Inputs:
        """Draw random inputs: the same numbers for every implementation.

        The logits have a standard deviation near 1 and the cotangents are random: a cotangent of
        ones would make Sinkhorn's gradient nearly zero.
        """
        generator = torch.Generator().manual_seed(seed)
        n, C, rows = self.streams, self.channels, self.streams * (self.streams + 2)

        def draw(*shape: int, std: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
            return (std * torch.randn(*shape, generator=generator)).to(self.device, dtype)

        return Inputs(
            x=draw(1, self.tokens, n, C, dtype=self.torch_dtype),
            y=draw(1, self.tokens, C, dtype=self.torch_dtype),
            phi=draw(rows, n * C, std=(n * C) ** -0.5),
            alpha=1 + draw(3, std=0.1),
            bias=draw(rows, std=0.5),
            grad_u=draw(1, self.tokens, C, dtype=self.torch_dtype),
            grad_new=draw(1, self.tokens, n, C, dtype=self.torch_dtype),
        )


def reference_step(
    x: Tensor, y: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, *, numerics: NumericsName
) -> tuple[Tensor, Tensor]:
    """Compute (u, x') of one connection by the reference, in the dtype of the inputs."""
    config = ConnectionConfig(streams=x.shape[-2], numerics=numerics)
    pre, post, res = coefficients(
        x, phi, alpha, bias, config.iterations, config.constraint, preset(numerics)
    )
    return read(x, pre), write(x, y, post, res)
