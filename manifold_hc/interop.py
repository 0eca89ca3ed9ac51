"""Connections of released models, by the names their checkpoints use."""

import re
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from manifold_hc.connection import Connection
from manifold_hc.errors import ConfigError, ShapeError
from manifold_hc.maps import copy_whole
from manifold_hc.stack import Stack

OURS = {"fn": "phi", "base": "bias", "scale": "alpha"}
"""Our parameters by DeepSeek's names; shapes and rows are the same."""

SUBLAYERS = {"attn": 0, "ffn": 1}

SUBLAYER = re.compile(
    r"(?:model\.)?layers\.(?P<layer>\d+)\."
    r"(?:hc_(?P<a>attn|ffn)_(?P<b>fn|base|scale)|(?P<c>attn|ffn)_hc\.(?P<d>fn|base|scale))"
)
HEAD = re.compile(r"(?:model\.)?hc_head(?:_|\.hc_)(?P<name>fn|base|scale)")


def load_deepseek(stack: Stack, tensors: Mapping[str, Tensor]) -> None:
    """Take over the connections of a DeepSeek-V4 or V4.1 model (arXiv 2606.19348).

    tensors: a checkpoint, or the part of it that holds `layers.N.hc_attn_fn`, `_base`, `_scale` and
    `hc_ffn_*`, and for V4 the exit's `hc_head_*`; transformers' names (`layers.N.attn_hc.fn`,
    `hc_head.hc_fn`) do as well, and everything else is left alone, multi-token prediction (`mtp.*`)
    too. The stack has two sublayers a layer and numerics="deepseek_v4"; V4.1, which has no exit of
    its own, is single_pass.

    Raises ConfigError for another kind of stack, a part of one, and for tensors that are missing or
    left over, ShapeError for shapes that do not fit; the stack is as it was then.
    """
    config = stack.config
    fits = config.kind == "mhc" and config.dynamic and config.constraint == "sinkhorn"
    if not fits or config.numerics != "deepseek_v4" or config.disable:
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
    found = {place: (name, t) for name, t in tensors.items() if (place := _place(name)) is not None}
    if missing := sorted(wanted.keys() - found.keys()):
        raise ConfigError(
            f"load_deepseek: the stack of {len(stack.connections)} sublayers has "
            f"{len(missing)} parameters that the tensors lack, {_named(missing[0])} first; "
            + ("V4.1 has no head: single_pass=True" if missing[0][0] < 0 else "two make a layer")
        )
    if extra := sorted(found.keys() - wanted.keys()):
        raise ConfigError(
            f"load_deepseek: {len(extra)} tensors have no place in the stack of "
            f"{len(stack.connections)} sublayers, {found[extra[0]][0]} first; it needs two a layer "
            "and is single_pass for V4.1 alone"
        )
    for place, parameter in wanted.items():
        name, tensor = found[place]
        if tensor.shape != parameter.shape:
            raise ShapeError(
                f"load_deepseek: {name} must be {list(parameter.shape)} for this stack but is "
                f"{list(tensor.shape)}; are streams and channels the model's?"
            )
    with torch.no_grad():
        for place, parameter in wanted.items():
            copy_whole(parameter, found[place][1])


Place = tuple[int, str]
"""The sublayer, or -1 for the exit, and DeepSeek's name of the parameter."""


def _parameters(stack: Stack) -> dict[Place, Tensor]:
    owners: dict[int, nn.Module] = {
        sublayer: cast(Connection, connection).maps
        for sublayer, connection in enumerate(stack.connections)
    }
    if stack.exit is not None:
        owners[-1] = stack.exit
    return {
        (sublayer, theirs): owner.get_parameter(ours)
        for sublayer, owner in owners.items()
        for theirs, ours in OURS.items()
    }


def _place(name: str) -> Place | None:
    if match := HEAD.fullmatch(name):
        return -1, match["name"]
    if match := SUBLAYER.fullmatch(name):
        within = SUBLAYERS[match["a"] or match["c"]]
        return 2 * int(match["layer"]) + within, match["b"] or match["d"]
    return None


def _named(place: Place) -> str:
    sublayer, name = place
    if sublayer < 0:
        return f"hc_head_{name}"
    return f"layers.{sublayer // 2}.hc_{('attn', 'ffn')[sublayer % 2]}_{name}"
