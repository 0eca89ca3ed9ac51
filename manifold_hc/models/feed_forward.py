"""Gated feed-forward layer (SwiGLU, arXiv 2002.05202)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from manifold_hc.models.linear import Linear


class GatedFeedForward(nn.Module):
    """`(silu(u W_gate) * u W_up) W_down`."""

    def __init__(self, channels: int, width: int) -> None:
        """Draw the weights: gate_up [2, width, channels], down [channels, width]."""
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(2, width, channels))
        self._reset_gate_up()
        self.down = Linear(width, channels)

    def reset_parameters(self) -> None:
        """Draw every weight [out, in] from the uniform distribution within 1/sqrt(in) of 0."""
        self._reset_gate_up()
        self.down.reset_parameters()

    def _reset_gate_up(self) -> None:
        bound = 1 / math.sqrt(self.gate_up.shape[-1])
        nn.init.uniform_(self.gate_up, -bound, bound)

    def forward(self, u: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch C"]:
        """Transform every token on its own: [..., C] -> [..., C]."""
        return self.down(gated_hidden(u, self.gate_up))


def gated_hidden(
    u: Float[Tensor, "*batch C"], gate_up: Float[Tensor, "2 H C"]
) -> Float[Tensor, "*batch H"]:
    """Return the hidden activations `silu(u W_gate) * u W_up`, with both products as one."""
    gate, up = linear(u, gate_up.flatten(0, 1)).chunk(2, -1)
    return silu(gate) * up
