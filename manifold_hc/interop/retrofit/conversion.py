"""`convert`: residual connections of a model become (manifold-constrained) hyper-connections."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar, get_args

from torch import nn

from manifold_hc.config import ConnectionConfig, Kind, require_config
from manifold_hc.errors import ConfigError
from manifold_hc.interop.retrofit.blocks import (
    attach,
    connection_tensors,
    detached_on_error,
    new_stack,
    require_convertible,
    stream_blocks,
)
from manifold_hc.interop.retrofit.example import output_of, require_same
from manifold_hc.interop.retrofit.families import family_of
from manifold_hc.interop.retrofit.record import Retrofit, base_of
from manifold_hc.interop.retrofit.sublayers import (
    SublayerFunction,
    as_sublayers,
    require_complete,
)

Model = TypeVar("Model", bound=nn.Module)
Trainable = Literal["all", "connections"]


def convert(
    model: Model,
    kind: Kind = "mhc",
    streams: int = 4,
    *,
    config: ConnectionConfig | None = None,
    trainable: Trainable = "all",
    blocks: str | None = None,
    sublayers: Sequence[str | Sequence[str] | SublayerFunction] | None = None,
    channels: int | None = None,
    example: Any = None,
) -> Model:
    """Replace a model's residual connections by HC or mHC, in place; the function stays the same.

    Every residual addition `x = x + f(x)` becomes a connection around the branch `f`, whose norms
    stay in the branch. The first block expands the embedding to n streams [B, T, n, C], the blocks
    pass the streams on, and the last block collapses them before the final norm (arXiv 2512.24880,
    section 3). With the initial parameters listed at `manifold_hc.maps.Maps` the output is that of
    the model before, up to rounding; numerics="deepseek_v4" is about 1e-6 a sublayer off.

    Args:
        model: Decoder of transformers whose `model_type` is in `retrofit.FAMILIES`; or any
            module, described by `blocks` and `sublayers`.
        kind: "mhc", "hc" (arXiv 2409.19606), or "residual" for the same code without streams.
        streams: Number n of streams.
        config: Configuration of the connections in place of `kind` and `streams`. `single_pass` is
            refused. Without it the exit is the mean of the streams for "hc" too, so that the output
            stays the same at any epsilon of the final norm; HC's paper takes the sum.
        trainable: "connections" freezes every other parameter.
        blocks: Path of the module that holds the blocks in depth order, such as "transformer.h".
        sublayers: Residual branches of one block, in order. Each is a tuple of names of the block's
            modules or methods that are called one after another, such as ("ln_1", "attn"); a
            `retrofit.Sublayer`; or a function (block, u [B, T, C], **arguments) -> y [B, T, C] that
            gets the block's other arguments by name. Only `example` checks the order and factors
            of the branches.
        channels: Channels C of the hidden state; None for the size of a block's first norm.
        example: Input of the model: a tensor, a tuple of positional arguments or a dict of keyword
            arguments. The model runs with it before and after, in eval mode, and outputs that
            differ by more than rounding are an error: a check of the description.

    Returns:
        The model itself.

    Raises:
        ConfigError: If the model is converted already, its family is unknown, a description names
            a module that a block lacks or leaves out parameters of a block, a block has hooks or a
            forward of its own, the model has layers of PEFT or DTensors, the output for `example`
            changes, or an argument is not valid. The model is then unchanged.

    Example:
        >>> import torch, manifold_hc as mhc
        >>> from manifold_hc.interop.retrofit import convert
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, norm_first=True, batch_first=True)
        >>> model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
        >>> x = torch.randn(3, 5, 8)
        >>> before = model(x)
        >>> def attend(block, u, src_mask=None, src_key_padding_mask=None, is_causal=False):
        ...     return block._sa_block(block.norm1(u), src_mask, src_key_padding_mask, is_causal)
        >>> model = convert(model, blocks="layers", sublayers=[attend, ("norm2", "_ff_block")])
        >>> torch.allclose(model(x), before, atol=1e-5)
        True
    """
    connection = chosen_config(kind, streams, config)
    if trainable not in get_args(Trainable):
        raise ConfigError(f"convert: trainable must be all or connections but is {trainable!r}")
    found, branches, width = describe(model, blocks, sublayers, channels)
    record = Retrofit(connection, base_of(model))
    stack = new_stack(list(found.values()), len(branches), width, connection)
    before = None if example is None else output_of(model, example)
    attach(list(found.values()), branches, stack)
    if before is not None:
        with detached_on_error(list(found.values())):
            require_same(before, output_of(model, example))
    if trainable == "connections":
        freeze_base(model)
    adopt(model, record)
    return model


def chosen_config(kind: Kind, streams: int, config: ConnectionConfig | None) -> ConnectionConfig:
    """Return the configuration of the connections; ConfigError for one that cannot be used."""
    if config is None:
        chosen = ConnectionConfig(kind=kind, streams=streams)
        return replace(chosen, exit="mean") if kind == "hc" else chosen
    chosen = require_config("convert", config)
    if (kind, streams) not in (("mhc", 4), (chosen.kind, chosen.streams)):
        raise ConfigError(
            "convert: kind and streams must be left out if config is given, but are "
            f"{kind!r} and {streams} with a config of {chosen.kind!r} and {chosen.streams}"
        )
    if chosen.is_single_pass:
        raise ConfigError(
            "convert: single_pass must be off, because a block gets no pre of the block before; "
            "build the model on mhc.Stack to use it"
        )
    return chosen


def describe(
    model: nn.Module,
    blocks: str | None,
    sublayers: Sequence[Any] | None,
    channels: int | None,
) -> tuple[dict[str, nn.Module], tuple[SublayerFunction, ...], int]:
    """Return a model's blocks by name, their branches, and the channels C.

    Raises:
        ConfigError: If the model cannot be converted.
    """
    _require_unconverted(model)
    if not is_pretrained(model):
        found = _blocks_at(model, blocks)
        branches = as_sublayers(sublayers or ())
        width = _channels_of(next(iter(found.values()))) if channels is None else channels
    elif blocks is None and sublayers is None and channels is None:
        pretrained: Any = model
        family, branches = family_of(pretrained.config)
        base = pretrained.base_model
        name = next((name for name, module in model.named_modules() if module is base), "")
        found = _blocks_at(model, f"{name}.{family.layers}".removeprefix("."))
        width = pretrained.config.get_text_config().hidden_size
    else:
        raise ConfigError(
            "convert: blocks, sublayers and channels must be left out for a model of "
            "transformers, which reloads by its family; describe it with "
            f"retrofit.FAMILIES[{model.config.model_type!r}] = retrofit.Family(...)"  # type: ignore[union-attr]
        )
    require_convertible(found, branches)
    if not is_pretrained(model):
        for name, block in found.items():
            require_complete(block, name, branches)
    return found, branches, width


def is_pretrained(model: nn.Module) -> bool:
    """True if this is a model of transformers; does not import transformers."""
    transformers: Any = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def adopt(model: nn.Module, record: Retrofit) -> None:
    """Keep the record; a model of transformers gets a class and configuration that save it."""
    if is_pretrained(model):
        from manifold_hc.interop.retrofit.whole_model import adopt_pretrained

        adopt_pretrained(model, record)
    model.hc_retrofit = record  # type: ignore[assignment]


def freeze_base(model: nn.Module) -> None:
    """Freeze every parameter of a converted model but its connections'."""
    own = {id(tensor) for tensor in connection_tensors(model).values()}
    for parameter in model.parameters():
        if id(parameter) not in own:
            parameter.requires_grad_(False)


def _require_unconverted(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"convert: model must be a torch.nn.Module but is {type(model).__name__}; load it first"
        )
    if stream_blocks(model):
        raise ConfigError(
            "convert: the model must have residual connections but is converted already; "
            "load the base model again to convert it in another way"
        )
    if hasattr(model, "_orig_mod"):
        raise ConfigError(
            "convert: the model must not be compiled yet; convert, then torch.compile"
        )
    wrapped = hasattr(model, "peft_config") and not is_pretrained(model)
    if wrapped or (layer := _peft_layer(model)):
        found = "" if wrapped else f" but {layer} is a layer of PEFT"
        raise ConfigError(
            f"convert: the model must not be wrapped by PEFT yet{found}; write "
            "get_peft_model(mhc.convert(model), ...), or convert what merge_and_unload() returns"
        )


def _peft_layer(model: nn.Module) -> str:
    """Return the name of the first module of a class of PEFT, empty if there is none."""
    for name, module in model.named_modules():
        if any(kind.__module__.partition(".")[0] == "peft" for kind in type(module).__mro__):
            return name or type(module).__name__
    return ""


def _blocks_at(model: nn.Module, path: str | None) -> dict[str, nn.Module]:
    if path is None:
        raise ConfigError(
            f"convert: {type(model).__name__} is not a model of transformers: describe its blocks, "
            'such as blocks="transformer.h", sublayers=[("ln_1", "attn"), ("ln_2", "mlp")]'
        )
    try:
        holder = model.get_submodule(path)
    except AttributeError as error:
        raise ConfigError(f"convert: blocks must be a path in the model but {error}") from error
    children = holder._modules  # named_children leaves out a module that it meets again
    found = {f"{path}.{name}": block for name, block in children.items() if block is not None}
    if not isinstance(holder, Iterable) or not found:
        raise ConfigError(
            f"convert: blocks must be the path of a list of blocks but {path!r} is a "
            f"{type(holder).__name__}; take the ModuleList or Sequential in depth order"
        )
    return found


def _channels_of(block: nn.Module) -> int:
    for module in block.modules():
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            return module.normalized_shape[-1]
    raise ConfigError(
        f"convert: channels must be given, because {type(block).__name__} has no norm of torch "
        "that shows the size of the hidden state"
    )
