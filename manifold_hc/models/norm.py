"""RMS norm (arXiv 1910.07467) in the dtype of its input."""

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from manifold_hc.functional import InputNorm
from manifold_hc.known_forwards import KNOWN_FORWARDS


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` that casts its float32 weight to the dtype of its input, as autocast needs."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension: [..., C] -> [..., C], in the dtype of `x`."""
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return rms_norm(x, self.normalized_shape, weight, self.eps)

    def input_norm(self, dtype: torch.dtype) -> InputNorm | None:
        """Return the weight and epsilon with which a connection may compute this norm itself.

        dtype: of the inputs. None if the norm has no weight or no fixed epsilon.
        """
        if self.weight is None or self.eps is None:
            return None
        wide = torch.promote_types(dtype, torch.float32)
        # Rounded to `dtype` first: the fused norm then multiplies by the same bits as `forward`.
        return InputNorm(self.weight.to(dtype).to(wide), self.eps)


KNOWN_FORWARDS[RMSNorm] = RMSNorm.forward
