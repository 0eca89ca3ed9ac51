"""Linear layer without a bias."""

from torch import nn


class Linear(nn.Linear):
    """`nn.Linear` without a bias: [..., inputs] -> [..., outputs]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        """Draw the weight [outputs, inputs] as `nn.Linear` does."""
        super().__init__(inputs, outputs, bias=False)
