"""Weights of the connections in checkpoints of DeepSeek-V4 and V4.1."""

from collections.abc import Mapping

import torch
from torch import Tensor

from manifold_hc.errors import ConfigError, ShapeError
from manifold_hc.interop.layouts import LAYOUTS, Layout, reading
from manifold_hc.maps import copy_whole
from manifold_hc.numerics import PRESETS
from manifold_hc.stack import Stack

NAMES = (LAYOUTS["deepseek_v4"], LAYOUTS["transformers"])
"""Layouts that a checkpoint may have: names of the released files, or of transformers' modules."""


def load_deepseek(stack: Stack, tensors: Mapping[str, Tensor]) -> None:
    """Copy the connections of a DeepSeek-V4 or V4.1 model (arXiv 2606.19348) into `stack`.

    Args:
        stack: dynamic mHC with two sublayers a layer and numerics="deepseek_v4"; for V4.1, which
            has no exit of its own, with single_pass=True.
        tensors: a checkpoint's tensors by name: `layers.N.hc_attn_fn`, `_base`, `_scale`,
            `hc_ffn_*`, and for V4 the exit's `hc_head_*`, or transformers' names for them
            (`layers.N.attn_hc.fn`, `hc_head.hc_fn`). Tensors that are no connections are ignored,
            those of multi-token prediction (`mtp.*`) too.

    Raises:
        ConfigError: for another kind of stack, for one pipeline stage of a stack, and for tensors
            that are missing or left over, each of them named.
        ShapeError: for tensors with another shape than the stack's parameters, each of them named.
            After an error the stack is unchanged.
    """
    config = stack.config
    fits = config.kind == "mhc" and config.dynamic and config.constraint == "sinkhorn"
    if not fits or not PRESETS[config.numerics].res_is_transposed or config.disable:
        raise ConfigError(
            'load_deepseek: the stack must be dynamic mhc with numerics="deepseek_v4", Sinkhorn '
            f"and nothing disabled but is {config}"
        )
    if not (stack.begins and stack.ends):
        raise ConfigError(
            "load_deepseek: the stack must be whole but is a part of one; load the whole stack, "
            "then take its part"
        )
    layout = max(NAMES, key=lambda one: _count(one, tensors))
    found = reading.find(layout.names, tensors)
    parameters = dict(stack.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    problems = reading.compare(layout.names, found, tensors, shapes)
    if problems.all:
        error = ConfigError if problems.missing or problems.extra else ShapeError
        raise error(
            f"load_deepseek: the tensors must be those of a stack of {len(stack.connections)} "
            f"sublayers with exit {config.exit_rule}, two a layer and single_pass=True for V4.1, "
            f"but {'; '.join(problems.all)}"
        )
    native = reading.collect(layout.names, found, tensors, shapes, config.n)
    with torch.no_grad():
        for name, parameter in parameters.items():
            copy_whole(parameter, native[name])


def _count(layout: Layout, tensors: Mapping[str, Tensor]) -> int:
    return len(reading.find(layout.names, tensors).places)
