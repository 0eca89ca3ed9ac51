"""What autocast means to operations that it does not know."""

import torch
from torch import Tensor


def compute_dtype(u: Tensor) -> torch.dtype:
    """What a linear layer would compute in: autocast's dtype where it is on."""
    device = u.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else u.dtype
