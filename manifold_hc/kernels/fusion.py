"""Whether what lies between two sublayers is one pass: yes, but where it was measured slower."""

import torch

_apart: set[tuple[str, torch.dtype, int, int, bool]] = set()


def is_fused(device: str, dtype: torch.dtype, n: int, channels: int, single_pass: bool) -> bool:
    """Whether a boundary between such streams is one operator; device: its type."""
    return (device, dtype, n, channels, single_pass) not in _apart


# Dynamo would guard on every entry of the set.
is_fused._dynamo_marked_constant = True  # type: ignore[attr-defined]


def fuse(
    device: str, dtype: torch.dtype, n: int, channels: int, single_pass: bool, yes: bool
) -> None:
    """From now on compute the boundaries between such streams in one pass, or write them first."""
    change = _apart.discard if yes else _apart.add
    change((device, dtype, n, channels, single_pass))
