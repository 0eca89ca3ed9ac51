"""RMS norm (arXiv 1910.07467) in the dtype of its input."""

from torch import Tensor, nn
from torch.nn.functional import rms_norm


class RMSNorm(nn.RMSNorm):
    """torch's, for streams narrower than its weight: under autocast the weight stays in float32."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return rms_norm(x, self.normalized_shape, weight, self.eps)
