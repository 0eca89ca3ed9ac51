"""Documents as they lie on disk: text, JSON lines, Parquet, or folders of these."""

from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from manifold_hc.errors import DataError

ROWS = 1024
"""Rows of a Parquet file that are held at a time."""


def documents(path: Path, text_key: str = "text") -> Iterator[str]:
    """The documents at `path`: a text file is one, a JSON line or a row of Parquet is one.

    A folder gives those of all its files in the order of their names. Empty documents are left out.
    Raises DataError, with file and line, for what is missing, unreadable, broken or binary.
    """
    found = False
    for file in files(path):
        for text in _reader(file)(file, text_key):
            found = True
            yield text
    if not found:
        raise DataError(f"data: {path} is empty; give a text with --data")


def files(path: Path) -> list[Path]:
    """The file `path`, or the files in the folder `path` that have a known suffix, sorted."""
    if str(path).encode(errors="replace") != str(path).encode(errors="backslashreplace"):
        raise DataError(f"data: the path {path} is not valid UTF-8; rename the file")
    if not path.exists():
        raise DataError(f"data: {path} does not exist; give a text with --data")
    if not path.is_dir():
        return [path]
    found = sorted(
        file
        for file in path.rglob("*")
        if file.suffix in READERS and not file.name.startswith(".") and file.is_file()
    )
    if not found and any(path.glob("shard-*.safetensors")):
        raise DataError(f"data: {path} holds shards without their shards.json; it is not whole")
    if not found:
        raise DataError(f"data: {path} is a folder without {', '.join(READERS)} files or shards")
    return found


def _reader(file: Path) -> Callable[[Path, str], Iterator[str]]:
    return READERS.get(file.suffix, _text)


def _text(file: Path, _: str) -> Iterator[str]:
    text = _decoded(_read(file), f"{file} is not UTF-8 text but binary; give a text with --data")
    if text.strip():
        yield text


def _json_lines(file: Path, key: str) -> Iterator[str]:
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                line = line.removeprefix(BOM_UTF8)
                if line.strip():
                    yield from _whole(_json_text(line, key, f"{file}, line {number}"))
    except OSError as error:
        raise DataError(f"data: {file} cannot be read: {error.strerror}") from error


def _json_text(line: bytes, key: str, place: str) -> str:
    try:
        record: Any = msgspec.json.decode(line)
    except UnicodeDecodeError:
        raise DataError(f"data: {place}: not valid JSON: it is not UTF-8") from None
    except (msgspec.MsgspecError, RecursionError) as error:
        raise DataError(f"data: {place}: not valid JSON: {error}") from None
    if not isinstance(record, dict):
        raise DataError(f"data: {place}: must be an object with the key {key!r}")
    text = record.get(key)
    if not isinstance(text, str):
        problem = "is no text" if key in record else f"is missing; there are {', '.join(record)}"
        raise DataError(f"data: {place}: the key {key!r} {problem}; see data.text_key")
    return _decoded(text, f"{place}: the text is binary, it has a NUL character")


def _parquet(file: Path, key: str) -> Iterator[str]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DataError(
            f"data: {file} needs pyarrow; install it with: pip install 'manifold-hc[parquet]'"
        ) from None
    try:
        with parquet.ParquetFile(file) as table:
            if key not in (names := table.schema_arrow.names):
                raise DataError(
                    f"data: {file} has no column {key!r} but {', '.join(names)}; see data.text_key"
                )
            row = 0
            for batch in table.iter_batches(ROWS, columns=[key]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if not isinstance(text, str):
                        raise DataError(f"data: {file}, row {row}: {key!r} is no text")
                    problem = f"{file}, row {row}: the text is binary, it has a NUL character"
                    yield from _whole(_decoded(text, problem))
    except (ArrowException, OSError) as error:
        raise DataError(f"data: {file} cannot be read as Parquet: {error}") from None


READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".txt": _text,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".parquet": _parquet,
}
"""Suffixes that a folder is searched for; a single file of another suffix is read as text."""


def _whole(text: str) -> Iterator[str]:
    if text:
        yield text


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"data: {file} cannot be read: {error.strerror}") from error


def _decoded(content: bytes | str, problem: str) -> str:
    """Text without NUL, which is the boundary between documents of bytes."""
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        text.encode("utf-8")
    except UnicodeError:
        raise DataError(f"data: {problem}") from None
    if "\0" in text:
        raise DataError(f"data: {problem}")
    return text
