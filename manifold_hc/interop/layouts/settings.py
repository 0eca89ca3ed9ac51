"""Hyperparameters of connections that no tensor's shape holds: iterations, epsilons, exit."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from typing import Any

from manifold_hc.config import ConnectionConfig
from manifold_hc.errors import CheckpointError, ConfigError, shown
from manifold_hc.interop.layouts.layout import Layout
from manifold_hc.interop.layouts.names import LAYER_DIGITS
from manifold_hc.interop.layouts.native import MATRICES
from manifold_hc.interop.tensor_files import TensorFiles
from manifold_hc.numerics import preset

METADATA = "manifold_hc"
"""Key of our entry in the metadata of a safetensors file."""

FIELDS = tuple(field.name for field in fields(ConnectionConfig))

FROM_CONFIG = {
    "hc_mult": "streams",
    "hc_sinkhorn_iters": "iterations",
    "hc_eps": "hc_eps",
    "rms_norm_eps": "norm_eps",
}
"""Keys of config.json in DeepSeek's and transformers' models, and the fields they set."""

MODEL_TYPES = {"glm5_next": "glm5"}
"""Model types of transformers whose preset is not the layout's."""

FREE = ("alpha", "phi_std", "backend", "fuse_boundaries")
"""Fields that change no function of trained connections: initial values and the backend."""

UNSEEN = ("iterations", "norm_eps", "hc_eps")
"""Fields that no shape shows, and that a layout has defaults for."""


@dataclass(frozen=True)
class Settings:
    """Hyperparameters of a checkpoint, from wherever they are written."""

    base: ConnectionConfig | None = None
    """Whole configuration, of a file or a run that this package wrote."""
    known: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the configuration that config.json or the user gives."""
    layers: int | None = None
    """Number of layers, if config.json has it."""
    channels: int | None = None
    """Channels, if the file or config.json has them."""
    layout: str | None = None
    """Layout, if the file names its own."""

    def config(self, layout: Layout, streams: int | None, has_exit: bool) -> ConnectionConfig:
        """Return the configuration: known values, else the file's own, else the layout's defaults.

        streams: n by the shapes; None if they do not give it. has_exit: True if the tensors have a
        learned exit.
        """
        if self.base is not None:
            return ConnectionConfig(**{**asdict(self.base), **self.known})
        values = asdict(layout.config(4 if streams is None else streams))
        if has_exit:
            values["exit"] = "learned"
        if self.known.get("numerics", layout.numerics) != layout.numerics:
            values |= {"norm_eps": None, "hc_eps": None, "exit": None}
        if "single_pass" in self.known:
            values["exit"] = None
        return ConnectionConfig(**{**values, **self.known})

    def require_streams(self, files: TensorFiles, streams: int | None) -> None:
        """Raise CheckpointError unless the shapes have the number of streams that is written."""
        written = self.known.get("streams") if self.base is None else self.base.n
        packed = self.base is None or self.base.constraint in MATRICES
        if packed and written is not None and streams is not None and written != streams:
            raise CheckpointError(
                f"{files.path}: must have connections of {written!r} streams, as its configuration "
                f"says, but the shapes are those of {streams}"
            )

    def assumed(self) -> tuple[str, ...]:
        """Return the fields that take the layout's defaults because nothing gives them."""
        return () if self.base else tuple(name for name in UNSEEN if name not in self.known)


def gather(files: TensorFiles, overrides: Mapping[str, Any]) -> Settings:
    """Return the hyperparameters of a model's files, and `overrides` for those they do not give.

    Raises ConfigError for a field that does not exist or a value that contradicts the files,
    CheckpointError for damaged metadata.
    """
    if unknown := [name for name in overrides if name not in FIELDS]:
        close = get_close_matches(unknown[0], FIELDS, n=1)
        hint = f"; did you mean {close[0]}?" if close else f"; fields are {', '.join(FIELDS)}"
        raise ConfigError(f"{unknown[0]}: is no field of the connections{hint}")
    given = {name: value for name, value in overrides.items() if value is not None}
    if METADATA in files.metadata:
        return _from_metadata(files, given)
    if "connection" in files.config:
        channels = _size(files.config.get("model"), "channels")
        return _of_this_package(files, files.config["connection"], given, channels)
    text = files.config.get("text_config", files.config)
    if not isinstance(text, Mapping):
        raise CheckpointError(f"{files.path}: text_config of config.json must be an object")
    read = {ours: text[theirs] for theirs, ours in FROM_CONFIG.items() if theirs in text}
    if (preset := MODEL_TYPES.get(str(text.get("model_type")).removesuffix("_text"))) is not None:
        read["numerics"] = preset
    _require_agreement(files, read, given)
    layers = _size(text, "num_hidden_layers")
    if layers is not None and layers >= 10**LAYER_DIGITS:
        raise CheckpointError(f"{files.path}: config.json has {shown(layers)} layers")
    return Settings(None, {**read, **given}, layers=layers)


def _from_metadata(files: TensorFiles, given: Mapping[str, Any]) -> Settings:
    try:
        entry = json.loads(files.metadata[METADATA])
        layout, channels, connection = entry["layout"], entry["channels"], entry["connection"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{files.path}: has damaged metadata: {error!r}") from None
    return _of_this_package(files, connection, given, channels, layout)


def resolved(config: ConnectionConfig) -> dict[str, Any]:
    """Return the fields of a configuration, with the preset's values in place of None."""
    numerics = preset(config.numerics, norm_eps=config.norm_eps, hc_eps=config.hc_eps)
    return asdict(config) | {
        "norm_eps": numerics.norm_eps,
        "hc_eps": numerics.hc_eps,
        "exit": config.exit_rule,
        "single_pass": config.is_single_pass,
    }


def _require_agreement(
    files: TensorFiles, written: Mapping[str, Any], given: Mapping[str, Any]
) -> None:
    """Raise ConfigError for a given value that is not the one in the files."""
    wrong = [
        f"{name} is {_short(written[name])} in the files, not {_short(value)}"
        for name, value in given.items()
        if name in written and name not in FREE and written[name] != value
    ]
    if wrong:
        raise ConfigError(
            f"{files.path}: {'; '.join(wrong)}; leave out the values that the files give"
        )


def _short(value: Any) -> str:
    """Format a value that may come from a file, in at most 40 characters."""
    return shown(value) if isinstance(value, int) else repr(value)[:40]


def _of_this_package(
    files: TensorFiles,
    connection: Any,
    given: Mapping[str, Any],
    channels: int | None = None,
    layout: str | None = None,
) -> Settings:
    """Return the settings of files that hold the whole configuration as JSON."""
    base = build_config(files, connection)
    _require_agreement(files, resolved(base), given)
    known = {name: value for name, value in given.items() if name in FREE}
    return Settings(base, known, channels=channels, layout=layout)


def build_config(files: TensorFiles, connection: Any) -> ConnectionConfig:
    """Return the configuration that a file of this package holds as JSON."""
    try:
        values = {**connection, "disable": tuple(connection.get("disable", ()))}
        return ConnectionConfig(**values)
    except (TypeError, AttributeError, ConfigError) as error:
        raise CheckpointError(f"{files.path}: has another configuration: {error}") from None


def metadata_of(layout: Layout, config: ConnectionConfig, channels: int) -> dict[str, str]:
    """Return the metadata that `gather` reads again."""
    entry = {"layout": layout.name, "channels": channels, "connection": asdict(config)}
    return {METADATA: json.dumps(entry), "format": "pt"}


def _size(content: Any, name: str) -> int | None:
    value = content.get(name) if isinstance(content, Mapping) else None
    return value if isinstance(value, int) and value > 0 else None
