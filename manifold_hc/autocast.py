"""What autocast means to operations that it does not know."""

import torch
from torch import Tensor


def has_autocast(device: str) -> bool:
    """Whether there is one for this type of device."""
    return torch.amp.is_autocast_available(device)


# Dynamo of PyTorch 2.10 does not trace it.
has_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_autocast(device: str) -> bool:
    """Whether it is on for this type of device."""
    return has_autocast(device) and torch.is_autocast_enabled(device)


def compute_dtype(u: Tensor) -> torch.dtype:
    """What a linear layer would compute in: autocast's dtype where it is on."""
    device = u.device.type
    return torch.get_autocast_dtype(device) if is_autocast(device) else u.dtype
