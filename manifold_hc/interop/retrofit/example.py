"""Comparison of a model before and after its conversion, on an example."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from manifold_hc.errors import ConfigError

TOLERANCE = 1e-3
"""Largest difference of float32 outputs, relative to the largest of them: the initial connections
of every preset stay below it, and a wrong description of the blocks does not."""

TOLERANCE_HALF = 0.1
"""The same for outputs below float32."""


def output_of(model: nn.Module, example: Any) -> Tensor:
    """Return the first floating-point output of a model, in eval mode and without gradients.

    example: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
    Raises ConfigError if there is no such output.
    """
    with torch.no_grad(), _evaluating(model):
        if isinstance(example, dict):
            output = model(**example)
        else:
            output = model(*example) if isinstance(example, tuple) else model(example)
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf
    raise ConfigError(
        "convert: the model must return a floating-point tensor for the example but returned "
        f"{type(output).__name__}; leave example out"
    )


def require_same(before: Tensor, after: Tensor) -> None:
    """Raise ConfigError unless two outputs agree up to the rounding of their dtype."""
    if after.shape != before.shape:
        raise ConfigError(
            "convert: the model must give the same output before and after, but on the example "
            f"its shape is {list(before.shape)} before and {list(after.shape)} after; run every "
            "block, in order"
        )
    error = float((after - before).abs().max() / before.abs().max())
    limit = TOLERANCE if before.dtype.itemsize >= 4 else TOLERANCE_HALF
    if not error <= limit:
        raise ConfigError(
            "convert: the model must give the same output before and after, but on the example "
            f"they differ by {error:.1e} of the largest value; describe every norm, dropout and "
            "multiplier between two residual additions, in the order of the calls"
        )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
