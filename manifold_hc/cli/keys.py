"""`key=value` overrides of a configuration, checked against its dataclasses."""

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import docstring_parser
import msgspec

from manifold_hc.errors import ConfigError

Config = TypeVar("Config")

LONGEST = 200
"""Characters of a value that an error message shows."""


def override(
    config: Config, pairs: Sequence[str], values: Mapping[str, object] | None = None
) -> Config:
    """Return a copy of the dataclass tree `config` with the overrides `a.b=value`.

    Args:
        config: a dataclass whose fields may be dataclasses.
        pairs: overrides; later ones win.
        values: overrides by key that need no parsing; pairs win over them.

    Raises:
        ConfigError: in one line, for an unknown key, a value of another type, and a value that the
            configuration does not allow.
    """
    tree: dict[str, Any] = {}
    given: list[tuple[str, object]] = list((values or {}).items())
    for index, pair in enumerate(pairs):
        key, equals, text = pair.partition("=")
        if not equals:
            following = pairs[index + 1] if index + 1 < len(pairs) else ""
            hint = suggestion(config, key, following) or "see --help for the keys"
            raise ConfigError(f"{pair!r} is not an option or key=value; {hint}")
        given.append((key, text))
    for key, value in given:
        *sections, name = key.split(".")
        branch = tree
        for section in sections:
            branch = branch.setdefault(section, {})
            if not isinstance(branch, dict):
                raise ConfigError(f"unknown key {key!r}; {section} has no keys of its own")
        branch[name] = value
    return _merged(config, tree)


def override_from(config: Config, file: Path) -> Config:
    """Return a copy of `config` with the keys of a JSON file, such as a run's `config.json`.

    The file may leave keys out. Raises ConfigError as `override` does, with the file's name.
    """
    try:
        return _merged(config, msgspec.json.decode(file.read_bytes(), type=dict[str, Any]))
    except (msgspec.MsgspecError, UnicodeError, RecursionError, ConfigError) as error:
        raise ConfigError(f"config: {file}: {error}") from None


def describe(config: Any, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield (key, default, sentence) of every leaf of a dataclass tree."""
    sentences = {
        parameter.arg_name: " ".join((parameter.description or "").split())
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
        yield f"{prefix}{field.name}", _format(value), sentence.strip()


def closest(config: Any, key: str, prefix: str = "") -> str | None:
    """Return the key of `config` closest to `key`; None if none is close."""
    known = [leaf for leaf, _, _ in describe(config, prefix)]
    last = {leaf.rpartition(".")[2]: leaf for leaf in reversed(known)}
    name = key.rpartition(".")[2]
    if key in known:
        return key
    if key in last:
        return last[key]
    if close := difflib.get_close_matches(key, known, n=1, cutoff=0.6):
        return close[0]
    return next((last[match] for match in difflib.get_close_matches(name, last, n=1)), None)


def suggestion(config: Any, key: str, following: str) -> str:
    """Return a hint for a `key` typed without "=", empty if no key is close.

    following: the next argument, which is the value unless it is an option or another key=value.
    """
    match = closest(config, key.replace("-", "_"))
    if match is None:
        return ""
    default = next(shown for leaf, shown, _ in describe(config) if leaf == match)
    if following and "=" not in following and not following.startswith("--"):
        return f"did you mean {match}={following}?"
    return f"did you mean {match}={'true' if default in ('true', 'false') else 'VALUE'}?"


def _format(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )


def _merged(config: Any, tree: dict[str, Any], prefix: str = "") -> Any:
    """Return `config` with the leaves of `tree`, texts or JSON values, validated together."""
    hints, changes = get_type_hints(type(config)), {}
    for name, new in tree.items():
        key, value = f"{prefix}{name}", getattr(config, name, None)
        if name not in hints or (isinstance(new, dict) and not dataclasses.is_dataclass(value)):
            raise ConfigError(_unknown(_first_leaf(key, new), config, prefix))
        if not dataclasses.is_dataclass(value):
            changes[name] = _parsed(key, new, hints[name], value)
        elif isinstance(new, dict):
            changes[name] = _merged(value, new, f"{key}.")
        else:
            inside = ", ".join(f"{key}.{field.name}" for field in dataclasses.fields(value))
            raise ConfigError(f"{key}: is a section; its keys are {inside}")
    try:
        return dataclasses.replace(config, **changes)
    except ConfigError as error:
        raise ConfigError(f"{prefix}{error}") from None


def _first_leaf(key: str, value: Any) -> str:
    """Return the full key of the first leaf below `key`."""
    while isinstance(value, dict) and value:
        name, value = next(iter(value.items()))
        key = f"{key}.{name}"
    return key


def _unknown(key: str, config: Any, prefix: str) -> str:
    close = closest(config, key, prefix)
    hint = f"did you mean {close}?" if close else "see --help for the keys"
    return f"unknown key {key!r}; {hint}"


def _parsed(key: str, new: Any, hint: Any, present: Any) -> Any:
    """Convert a value to the type `hint`; present: the current value, an example for the error."""
    value = new
    if get_origin(hint) is tuple and isinstance(new, str):
        value = [part.strip() for part in new.split(",") if part.strip()]
    try:
        return msgspec.convert(value, hint, strict=False)
    except (msgspec.ValidationError, UnicodeError):
        several = get_origin(hint) is tuple
        wanted = _several(get_args(hint), _format(present)) if several else _wanted(hint)
        raise ConfigError(f"{key}: must be {wanted} but is {_quoted(new)}") from None


def _quoted(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _wanted(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"one of {', '.join(get_args(hint))}"
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(_wanted, get_args(hint)))
    if hint is bool:
        return "true or false"
    return "null" if hint is type(None) else getattr(hint, "__name__", str(hint))


def _several(kinds: tuple[Any, ...], example: str) -> str:
    """Describe the elements of a tuple type: a fixed number, or any number of one type."""
    kind = kinds[0]
    if get_origin(kind) is Literal:
        return f"any of {', '.join(get_args(kind))}, with commas between,"
    noun = "numbers" if kind is float else "texts"
    if kinds[-1] is Ellipsis:
        return f"{noun} with commas between"
    return f"{len(kinds)} {noun}, as {example},"
