"""Gated feed-forward layer (SwiGLU, arXiv 2002.05202)."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import silu


class GatedFeedForward(nn.Module):
    """`(silu(u W_gate) * u W_up) W_down`."""

    def __init__(self, channels: int, width: int) -> None:
        """channels: C; width: hidden size."""
        super().__init__()
        self.gate_up = nn.Linear(channels, 2 * width, bias=False)
        self.down = nn.Linear(width, channels, bias=False)

    def forward(self, u: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch C"]:
        """[..., C] -> [..., C]."""
        gate, up = self.gate_up(u).chunk(2, -1)
        return self.down(silu(gate) * up)
