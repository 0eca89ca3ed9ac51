"""The record of a conversion: its connections, and name and digests of the base model."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import nn

from manifold_hc.config import ConnectionConfig
from manifold_hc.errors import CheckpointError, ConfigError
from manifold_hc.interop.retrofit.digests import digests_of

RUN_TIME = ("backend", "fuse_boundaries")
"""Fields of the configuration that belong to a machine and not to a model."""


@dataclass(frozen=True)
class BaseModel:
    """Name and digests of the model that was converted; see `digests.Digests`."""

    name: str
    """Folder or hub name that it was loaded from; its class for a model built in memory."""
    fingerprint: str
    """Digest of every value, each tensor in its own dtype."""
    rounded: str = ""
    """Digest of every value in bfloat16; empty in a record of an earlier version."""
    dtype: str = ""
    """Dtypes of the tensors; empty in a record of an earlier version."""

    def is_same(self, other: "BaseModel") -> bool:
        """True if both have the same values: exactly, or in bfloat16 if the dtypes differ."""
        if self.dtype == other.dtype:
            return self.fingerprint == other.fingerprint
        return self.rounded == other.rounded

    def __str__(self) -> str:
        if not self.dtype:
            return f"{self.name!r} (recorded by an earlier version, which did not read all values)"
        return f"{self.name!r} (fingerprint {self.fingerprint}, {self.dtype})"


@dataclass(frozen=True)
class Retrofit:
    """Record of a conversion, kept by the converted model as `model.hc_retrofit`."""

    connection: ConnectionConfig
    base: BaseModel

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON values; the fields in `RUN_TIME` are left out.

        Fields at their default are stored too: a later version may have another default.
        """
        connection = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self.connection).items()
            if name not in RUN_TIME
        }
        return {"connection": connection, "base": asdict(self.base)}

    @classmethod
    def from_json(cls, saved: Any, file: str) -> "Retrofit":
        """Return the record that `to_json` has written; file: named in errors.

        Fields of the configuration that an earlier version has not written take their default.

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
            digests = (str(base.get(key, "")) for key in ("rounded", "dtype"))
            named = BaseModel(str(base["name"]), str(base["fingerprint"]), *digests)
            return cls(ConnectionConfig(**connection), named)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"load: {file} must hold the record of a retrofit but does not: {error}"
            ) from error


def base_of(model: nn.Module) -> BaseModel:
    """Return name and present digests of a model; connections do not count."""
    name = str(getattr(model, "name_or_path", "")) or type(model).__name__
    exact, rounded, dtype = digests_of(model)
    return BaseModel(name, exact, rounded, dtype)
