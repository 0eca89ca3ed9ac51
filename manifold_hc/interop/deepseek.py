"""Weights of the connections in checkpoints of DeepSeek-V4 and V4.1."""

import re
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from manifold_hc.connection import Connection
from manifold_hc.errors import ConfigError, ShapeError
from manifold_hc.maps import copy_whole
from manifold_hc.numerics import PRESETS
from manifold_hc.stack import Stack

PARAMETERS = {"fn": "phi", "base": "bias", "scale": "alpha"}
"""DeepSeek's parameter names and ours; shapes and order of rows are the same."""

SUBLAYERS = {"attn": 0, "ffn": 1}
"""Index of a sublayer within its layer."""

SUBLAYER = re.compile(
    r"(?:model\.)?layers\.(?P<layer>\d+)\."
    r"(?:hc_(?P<a>attn|ffn)_(?P<b>fn|base|scale)|(?P<c>attn|ffn)_hc\.(?P<d>fn|base|scale))"
)
HEAD = re.compile(r"(?:model\.)?hc_head(?:_|\.hc_)(?P<name>fn|base|scale)")

Key = tuple[int, str]
"""Index of the sublayer, or -1 for the exit, and DeepSeek's name of the parameter."""


def load_deepseek(stack: Stack, tensors: Mapping[str, Tensor]) -> None:
    """Copy the connections of a DeepSeek-V4 or V4.1 model (arXiv 2606.19348) into `stack`.

    Args:
        stack: dynamic mHC with two sublayers a layer and numerics="deepseek_v4"; for V4.1, which
            has no exit of its own, with single_pass=True.
        tensors: a checkpoint's tensors by name: `layers.N.hc_attn_fn`, `_base`, `_scale`,
            `hc_ffn_*`, and for V4 the exit's `hc_head_*`, or transformers' names for them
            (`layers.N.attn_hc.fn`, `hc_head.hc_fn`). Tensors with other names are ignored, those of
            multi-token prediction (`mtp.*`) too.

    Raises:
        ConfigError: for another kind of stack, for one pipeline stage of a stack, and for tensors
            that are missing or left over.
        ShapeError: for a tensor with another shape than the stack's parameter. After an error the
            stack is unchanged.
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
    wanted = _parameters(stack)
    found = {key: (name, t) for name, t in tensors.items() if (key := _parse_name(name))}
    if missing := sorted(wanted.keys() - found.keys()):
        raise ConfigError(
            f"load_deepseek: the stack of {len(stack.connections)} sublayers has "
            f"{len(missing)} parameters that the tensors lack, {_name_of(missing[0])} first; "
            + ("V4.1 has no head: single_pass=True" if missing[0][0] < 0 else "two make a layer")
        )
    if extra := sorted(found.keys() - wanted.keys()):
        raise ConfigError(
            f"load_deepseek: {len(extra)} tensors have no place in the stack of "
            f"{len(stack.connections)} sublayers, {found[extra[0]][0]} first; it needs two a layer "
            "and is single_pass for V4.1 alone"
        )
    for key, parameter in wanted.items():
        name, tensor = found[key]
        if tensor.shape != parameter.shape:
            raise ShapeError(
                f"load_deepseek: {name} must be {list(parameter.shape)} for this stack but is "
                f"{list(tensor.shape)}; are streams and channels the model's?"
            )
    with torch.no_grad():
        for key, parameter in wanted.items():
            copy_whole(parameter, found[key][1])


def _parameters(stack: Stack) -> dict[Key, Tensor]:
    """Return the stack's parameters by key."""
    modules: dict[int, nn.Module] = {
        sublayer: cast(Connection, connection).maps
        for sublayer, connection in enumerate(stack.connections)
    }
    if stack.exit is not None:
        modules[-1] = stack.exit
    return {
        (sublayer, theirs): module.get_parameter(ours)
        for sublayer, module in modules.items()
        for theirs, ours in PARAMETERS.items()
    }


def _parse_name(name: str) -> Key | None:
    """Return the key of a checkpoint's tensor; None if it belongs to no connection."""
    if match := HEAD.fullmatch(name):
        return -1, match["name"]
    if match := SUBLAYER.fullmatch(name):
        index = SUBLAYERS[match["a"] or match["c"]]
        return 2 * int(match["layer"]) + index, match["b"] or match["d"]
    return None


def _name_of(key: Key) -> str:
    sublayer, name = key
    if sublayer < 0:
        return f"hc_head_{name}"
    return f"layers.{sublayer // 2}.hc_{('attn', 'ffn')[sublayer % 2]}_{name}"
