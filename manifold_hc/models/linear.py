"""Weights of which this process may have a part."""

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear


def here(weight: Tensor) -> Tensor:
    """What this process has of a weight, where several share it."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


class Linear(nn.Linear):
    """torch's, without a bias, over the rows or columns of its weight that this process has."""

    def __init__(self, inputs: int, outputs: int) -> None:
        """inputs, outputs: sizes of all processes together."""
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs here] -> [..., outputs here]."""
        return linear(x, here(self.weight))
