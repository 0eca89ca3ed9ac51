"""Connections of a converted model in files of their own: a small adapter of the base model."""

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from manifold_hc.errors import CheckpointError, ConfigError, MissingExtraError
from manifold_hc.files import read_regular, write_atomically
from manifold_hc.interop.retrofit.blocks import (
    NAME,
    attach,
    connection_tensors,
    new_stack,
    stream_blocks,
)
from manifold_hc.interop.retrofit.conversion import adopt, describe, is_pretrained
from manifold_hc.interop.retrofit.record import BaseModel, Retrofit, base_of
from manifold_hc.maps import copy_whole

TENSORS = "connections.safetensors"
RECORD = "retrofit.json"

Model = TypeVar("Model", bound=nn.Module)


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Save the connections of a converted model, without the base model.

    Writes `connections.safetensors` and `retrofit.json`: the configuration of the connections, name
    and fingerprint of the base model, checksum of the tensors.

    Args:
        model: A model from `convert` whose base weights are unchanged since, such as one with
            trainable="connections".
        folder: Folder for the two files; made if it is missing.

    Raises:
        ConfigError: If the model is not converted, or wrapped by PEFT, which saves by itself.
        CheckpointError: If weights of the base model have changed since the conversion: they would
            be lost.
        OSError: If a file cannot be written.
    """
    safetensors = _safetensors("save_adapter")
    record = _record_of(model)
    present = base_of(model)
    if not present.is_same(record.base):
        raise CheckpointError(
            f"save_adapter: the base model must be unchanged since convert but its weights are "
            f"not those of {record.base} any more, they have {present.fingerprint}, "
            f'{present.dtype}; save the whole model, or train with trainable="connections"'
        )
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in connection_tensors(model).items()
    }
    data: bytes = safetensors.save(tensors, metadata={"format": "pt"})
    values = {**record.to_json(), "sha256": hashlib.sha256(data).hexdigest()}
    write_atomically(Path(folder) / TENSORS, data)
    write_atomically(Path(folder) / RECORD, json.dumps(values, indent=2) + "\n")


def load_adapter(model: Model, folder: str | Path) -> Model:
    """Load connections that `save_adapter` has saved, in place.

    Args:
        model: The base model, which is converted as the adapter says if it is one of transformers;
            or a converted model with the same connections.
        folder: Folder that `save_adapter` has written.

    Returns:
        The model itself.

    Raises:
        CheckpointError: If a file is missing or damaged, the base model or the connections are
            others, or a tensor is missing, left over or of another shape; all are named, and the
            model is unchanged.
        ConfigError: If the model is neither converted nor of a known family.
    """
    record, tensors = _read(Path(folder))
    _require_base(record.base, base_of(model), folder)
    if stream_blocks(model):
        _require_same_connections(_record_of(model), record, folder)
        _require_tensors(connection_tensors(model), tensors, folder)
    else:
        _convert_for(model, record, tensors, folder)
    with torch.no_grad():
        for name, parameter in connection_tensors(model).items():
            copy_whole(parameter, tensors[name].to(parameter.device))
    return model


def _convert_for(
    model: nn.Module, record: Retrofit, tensors: dict[str, Tensor], folder: str | Path
) -> None:
    if not is_pretrained(model):
        raise ConfigError(
            f"load_adapter: {type(model).__name__} must be converted first, because an adapter has "
            "no description of its blocks; write load_adapter(mhc.convert(model, blocks=...), ...)"
        )
    blocks, sublayers, channels = describe(model, None, None, None)
    each = len(sublayers)
    stack = new_stack(list(blocks.values()), each, channels, record.connection)
    wanted: dict[str, Tensor] = {}
    for index, name in enumerate(blocks):
        part = stack.part(range(index * each, (index + 1) * each), owned=False)
        wanted |= {f"{name}.{NAME}.{key}": value for key, value in part.named_parameters()}
    _require_tensors(wanted, tensors, folder)
    attach(list(blocks.values()), sublayers, stack)
    adopt(model, record)


def _record_of(model: nn.Module) -> Retrofit:
    if hasattr(model, "peft_config") and not is_pretrained(model):
        raise ConfigError(
            "save_adapter: the model must not be wrapped by PEFT, which saves the connections with "
            "its own; write model.save_pretrained(...), or give model.merge_and_unload()"
        )
    record = getattr(model, "hc_retrofit", None)
    if not isinstance(record, Retrofit):
        raise ConfigError(
            f"save_adapter: {type(model).__name__} must be a converted model but is not; "
            "call mhc.convert"
        )
    return record


def _read(folder: Path) -> tuple[Retrofit, dict[str, Tensor]]:
    safetensors = _safetensors("load_adapter")
    try:
        values: Any = json.loads(read_regular(folder / RECORD))
        data = read_regular(folder / TENSORS)
    except OSError as error:
        raise CheckpointError(
            f"load_adapter: {folder} must have {RECORD} and {TENSORS} but {error.filename} cannot "
            f"be read: {error.strerror}"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"load_adapter: {folder / RECORD} is not JSON: {error}") from error
    record = Retrofit.from_json(values, str(folder / RECORD))
    if hashlib.sha256(data).hexdigest() != values.get("sha256"):
        raise CheckpointError(
            f"load_adapter: {folder / TENSORS} must be the file that {RECORD} was written with but "
            "is damaged or another; copy both again"
        )
    return record, safetensors.load(data)


def _safetensors(feature: str) -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise MissingExtraError(
            f"{feature} needs safetensors; install with: pip install 'manifold-hc[transformers]'"
        ) from error
    return safetensors.torch


def _require_base(wanted: BaseModel, given: BaseModel, folder: str | Path) -> None:
    if not given.is_same(wanted):
        raise CheckpointError(
            f"load_adapter: the adapter in {folder} belongs to the base model {wanted} but the "
            f"model is {given}; load that base model"
        )


def _require_same_connections(own: Retrofit, saved: Retrofit, folder: str | Path) -> None:
    given, wanted = own.to_json()["connection"], saved.to_json()["connection"]
    faults = [
        f"{name} is {wanted[name]!r} in the adapter and {given[name]!r} in the model"
        for name in wanted
        if wanted[name] != given[name]
    ]
    if faults:
        raise CheckpointError(
            f"load_adapter: the adapter in {folder} must have the connections of the model but "
            f"{', '.join(faults)}; convert the model with the adapter's configuration"
        )


def _require_tensors(
    wanted: dict[str, Tensor], saved: dict[str, Tensor], folder: str | Path
) -> None:
    faults = [f"{name} is missing" for name in sorted(set(wanted) - set(saved))]
    faults += [f"{name} is left over" for name in sorted(set(saved) - set(wanted))]
    faults += [
        f"{name} is {list(saved[name].shape)} and not {list(wanted[name].shape)}"
        for name in sorted(set(wanted) & set(saved))
        if saved[name].shape != wanted[name].shape
    ]
    if faults:
        raise CheckpointError(
            f"load_adapter: {Path(folder) / TENSORS} must fit the model but {', '.join(faults)}"
        )
