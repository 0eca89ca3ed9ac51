"""Sections of a configuration file, built into dataclasses that refuse unknown keys."""

import difflib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import TypeVar, get_type_hints

from manifold_hc.errors import ConfigError

Section = TypeVar("Section")


def build_section(kind: type[Section], values: object, name: str) -> Section:
    """Build a configuration dataclass from nested mappings, as JSON holds them.

    Args:
        kind: the dataclass, such as `DecoderConfig`.
        values: a mapping from field names to values; keys left out get their defaults. An instance
            of `kind` is returned as it is.
        name: of the section, for messages.

    Raises:
        ConfigError: for a key that is no field, or a value that the dataclass refuses.
    """
    if isinstance(values, kind):
        return values
    if not isinstance(values, Mapping):
        raise ConfigError(f"{name}: must be a mapping of keys but is {values!r}")
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    if unknown := [key for key in values if key not in known]:
        near = difflib.get_close_matches(str(unknown[0]), known, 1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
        raise ConfigError(f"{name}.{unknown[0]}: is not a key of {kind.__name__}; {hint}")
    types = get_type_hints(kind)
    ready = {
        key: build_section(types[key], value, f"{name}.{key}")
        if is_dataclass(types[key])
        else tuple(value)
        if isinstance(value, list)
        else value
        for key, value in values.items()
    }
    try:
        return kind(**ready)
    except ConfigError as error:
        raise ConfigError(f"{name}.{error}") from None
