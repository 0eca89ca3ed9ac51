"""The record of a conversion: its connections, and name and fingerprint of the base model."""

import hashlib
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from manifold_hc.config import ConnectionConfig
from manifold_hc.errors import CheckpointError, ConfigError
from manifold_hc.interop.retrofit.blocks import connection_tensors

SAMPLES = 64
"""Values of each tensor that enter the fingerprint."""

RUN_TIME = ("backend", "fuse_boundaries")
"""Fields of the configuration that belong to a machine and not to a model."""


@dataclass(frozen=True)
class BaseModel:
    """Name and fingerprint of the model that was converted."""

    name: str
    """Folder or hub name that it was loaded from; its class for a model built in memory."""
    fingerprint: str
    """See `fingerprint`."""

    def __str__(self) -> str:
        return f"{self.name!r} (fingerprint {self.fingerprint})"


@dataclass(frozen=True)
class Retrofit:
    """Record of a conversion, kept by the converted model as `model.hc_retrofit`."""

    connection: ConnectionConfig
    base: BaseModel

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON values; fields at their default and `backend` are left out."""
        default = asdict(ConnectionConfig())
        connection = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self.connection).items()
            if name not in RUN_TIME and (name == "kind" or value != default[name])
        }
        return {"connection": connection, "base": asdict(self.base)}

    @classmethod
    def from_json(cls, saved: Any, file: str) -> "Retrofit":
        """Return the record that `to_json` has written; file: named in errors.

        Raises:
            CheckpointError: If the values are not a record, or a field is unknown or not valid.
        """
        try:
            connection, base = dict(saved["connection"]), dict(saved["base"])
            known = {field.name for field in fields(ConnectionConfig)}
            if unknown := sorted(set(connection) - known):
                raise ConfigError(f"unknown field {unknown[0]!r}; a later version has written it")
            if "disable" in connection:
                connection["disable"] = tuple(connection["disable"])
            name, digest = str(base["name"]), str(base["fingerprint"])
            return cls(ConnectionConfig(**connection), BaseModel(name, digest))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"load: {file} must hold the record of a retrofit but does not: {error}"
            ) from error


def base_of(model: nn.Module) -> BaseModel:
    """Return name and present fingerprint of a model; connections do not count."""
    name = getattr(model, "name_or_path", "")
    return BaseModel(str(name) or type(model).__name__, fingerprint(model))


def fingerprint(model: nn.Module) -> str:
    """Return 16 hexadecimal digits that depend on every parameter but the connections'.

    Names, shapes and 64 evenly spaced values of each enter it, rounded to bfloat16, so that a
    model loaded in float32 and in bfloat16 has one fingerprint.
    """
    own = connection_tensors(model)
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if name not in own:
            digest.update(f"{name} {list(parameter.shape)}".encode())
            digest.update(_sampled(parameter.detach()))
    return digest.hexdigest()[:16]


def _sampled(tensor: Tensor) -> bytes:
    if tensor.is_meta or not tensor.numel():
        return b""
    flat = tensor.reshape(-1)
    last, count = flat.numel() - 1, min(SAMPLES, flat.numel())
    places = [last * sample // max(count - 1, 1) for sample in range(count)]
    values = flat[torch.tensor(places, device=flat.device)].cpu()
    if values.is_floating_point():
        values = values.to(torch.bfloat16)
    return bytes(values.contiguous().view(torch.uint8).tolist())
