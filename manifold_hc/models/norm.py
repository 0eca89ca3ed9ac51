"""RMS norm (arXiv 1910.07467) in the dtype of its input."""

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from manifold_hc.functional import InputNorm
from manifold_hc.known_forwards import KNOWN_FORWARDS


class RMSNorm(nn.RMSNorm):
    """torch's, for streams narrower than its weight: under autocast the weight stays in float32."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return rms_norm(x, self.normalized_shape, weight, self.eps)

    def input_norm(self, dtype: torch.dtype) -> InputNorm | None:
        """What a connection may compute in its place, for inputs of this dtype."""
        if self.weight is None or self.eps is None:
            return None
        wide = torch.promote_types(dtype, torch.float32)
        return InputNorm(self.weight.to(dtype).to(wide), self.eps)


KNOWN_FORWARDS[RMSNorm] = RMSNorm.forward
