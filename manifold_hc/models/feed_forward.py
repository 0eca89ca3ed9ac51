"""Gated feed-forward layer (SwiGLU, arXiv 2002.05202)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from manifold_hc.models.linear import Linear, here


class GatedFeedForward(nn.Module):
    """`(silu(u W_gate) * u W_up) W_down`."""

    def __init__(self, channels: int, width: int) -> None:
        """channels: C; width: hidden size. gate_up: both matrices, [2, width, C]."""
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(2, width, channels))
        self._fill_gate_up()
        self.down = Linear(width, channels)

    def reset_parameters(self) -> None:
        """Draw every weight W [out, in] from the uniform distribution within 1/sqrt(in) of 0."""
        self._fill_gate_up()
        self.down.reset_parameters()

    def _fill_gate_up(self) -> None:
        bound = 1 / math.sqrt(self.gate_up.shape[-1])
        nn.init.uniform_(self.gate_up, -bound, bound)

    def forward(self, u: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch C"]:
        """[..., C] -> [..., C]."""
        gate, up = linear(u, here(self.gate_up).flatten(0, 1)).chunk(2, -1)
        return self.down(silu(gate) * up)
