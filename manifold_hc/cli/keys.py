"""`key=value` overrides of a configuration, checked against its dataclasses."""

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import docstring_parser
import msgspec

from manifold_hc.errors import ConfigError

Config = TypeVar("Config")


def override(config: Config, pairs: Sequence[str]) -> Config:
    """A copy of the dataclass tree `config` with `a.b=value` for every pair; later ones win.

    Raises ConfigError, in one line, for an unknown key, a value of another type, and a value that
    the configuration itself refuses.
    """
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"{pair!r} is not an option or key=value; see --help for the keys")
        config = _replaced(config, key, key.split("."), value)
    return config


def override_from(config: Config, file: Path) -> Config:
    """A copy of `config` with the keys of a JSON file, such as a run folder's `config.json`.

    The file may leave keys out. Raises ConfigError as `override` does, with the file's name.
    """
    try:
        tree = msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
        for key, value in _leaves(tree):
            config = _replaced(config, key, key.split("."), value)
    except (msgspec.MsgspecError, ConfigError) as error:
        raise ConfigError(f"config: {file}: {error}") from None
    return config


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def describe(config: Any, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(key, default, sentence) of every leaf of a dataclass tree."""
    sentences = {
        parameter.arg_name: parameter.description or ""
        for parameter in docstring_parser.parse_from_object(type(config)).params
    }
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from describe(value, f"{prefix}{field.name}.")
            continue
        sentence = sentences.get(field.name, "")
        if get_origin(hints[field.name]) is Literal:
            sentence += f" One of {', '.join(get_args(hints[field.name]))}."
        yield f"{prefix}{field.name}", _shown(value), sentence.strip()


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )


def _replaced(config: Any, key: str, path: list[str], new: Any) -> Any:
    """`config` with the leaf at `path` made from `new`, a text or a JSON value."""
    name, *rest = path
    fields = {field.name for field in dataclasses.fields(config)}
    if name not in fields:
        raise ConfigError(_unknown(key, path, config))
    value = getattr(config, name)
    if dataclasses.is_dataclass(value):
        if not rest:
            inside = ", ".join(f"{key}.{f.name}" for f in dataclasses.fields(value))
            raise ConfigError(f"{key}: is a section; its keys are {inside}")
        try:
            return dataclasses.replace(config, **{name: _replaced(value, key, rest, new)})
        except ConfigError as error:
            raise ConfigError(_located(key, path, str(error))) from None
    if rest:
        raise ConfigError(_unknown(key, path, config))
    parsed = _parsed(key, new, get_type_hints(type(config))[name])
    return dataclasses.replace(config, **{name: parsed})


def _located(key: str, path: list[str], message: str) -> str:
    """The message with its section in front, once."""
    section = key[: len(key) - len(".".join(path))] + path[0]
    return message if message.startswith((f"{section}.", "unknown key")) else f"{section}.{message}"


def _unknown(key: str, path: list[str], config: Any) -> str:
    prefix = key[: len(key) - len(".".join(path))]
    known = [f"{prefix}{leaf}" for leaf, _, _ in describe(config)]
    last = {leaf.rpartition(".")[2]: leaf for leaf in known}
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6) or [
        last[name] for name in difflib.get_close_matches(path[-1], last, n=1, cutoff=0.6)
    ]
    hint = f"did you mean {close[0]}?" if close else "see --help for the keys"
    return f"unknown key {key!r}; {hint}"


def _parsed(key: str, new: Any, hint: Any) -> Any:
    value = new
    if get_origin(hint) is tuple and isinstance(new, str):
        value = [part.strip() for part in new.split(",") if part.strip()]
    try:
        return msgspec.convert(value, hint, strict=False)
    except msgspec.ValidationError as error:
        wanted = (
            f"one of {', '.join(get_args(hint))}"
            if get_origin(hint) is Literal
            else getattr(hint, "__name__", str(hint))
        )
        reason = "" if get_origin(hint) is not tuple else f" ({error})"
        raise ConfigError(f"{key}: must be {wanted} but is {new!r}{reason}") from None
