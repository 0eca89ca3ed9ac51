"""JSON files of a run, read with errors that say how to repair them."""

from pathlib import Path
from typing import Any

import msgspec

from manifold_hc.errors import RunFolderError
from manifold_hc.files import read_regular


def damaged_error(file: Path, how: str, cure: str) -> RunFolderError:
    """Return the error for a file of a run with invalid content, and its repair."""
    return RunFolderError(f"run folder: {file} is damaged: {how}; {cure}")


def unreadable_error(file: Path, error: OSError) -> RunFolderError:
    """Return the error for a run file that cannot be read."""
    return RunFolderError(f"run folder: {file} cannot be read: {error.strerror}")


def read_json(file: Path, cure: str) -> Any:
    """Return the content of a JSON file; raise RunFolderError, with `cure` if it is damaged."""
    try:
        return msgspec.json.decode(read_regular(file))
    except FileNotFoundError:
        raise RunFolderError(f"run folder: {file.parent} has no {file.name}") from None
    except OSError as error:
        raise unreadable_error(file, error) from None
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise damaged_error(file, str(error), cure) from None


def read_record(file: Path, members: dict[str, Any], cure: str) -> dict[str, Any]:
    """Return a JSON object, empty if there is no file; `members` maps required names to types.

    Raises RunFolderError, with `cure`, for a file without these members.
    """
    if not file.exists():
        return {}
    content = read_json(file, cure)
    try:
        record = msgspec.convert(content, dict[str, Any])
        for name, kind in members.items():
            msgspec.convert(record.get(name), kind)
    except msgspec.ValidationError as error:
        raise damaged_error(file, str(error), cure) from None
    return record


def is_number(value: object) -> bool:
    """Return True for a number, and for the null that stands for one that is not finite."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
