"""Weights of a decoder, loaded strictly."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from manifold_hc.training.checkpoint_files import require_same_model


def load_weights(
    model: nn.Module, tensors: Mapping[str, Tensor], where: Path, prefix: str = ""
) -> None:
    """Copy tensors into the parameters and buffers of a model.

    Every tensor must have a place and every place a tensor of its shape. The model takes the dtype
    of the first matrix, but for parts that stay in float32.

    Args:
        model: the model; unchanged after an error.
        tensors: the tensors by name.
        where: file or folder that they come from, for messages.
        prefix: of every name in `tensors`.

    Raises:
        CheckpointError: for a tensor that is missing, unknown or of another shape; the message
            names it.
    """
    own = model.state_dict()
    wanted = {f"{prefix}{name}": tuple(tensor.shape) for name, tensor in own.items()}
    require_same_model(where, {name: tuple(t.shape) for name, t in tensors.items()}, wanted)
    model.to(next(tensor.dtype for tensor in tensors.values() if tensor.dim() == 2))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(tensors[f"{prefix}{name}"])
