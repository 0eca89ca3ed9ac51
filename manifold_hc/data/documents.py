"""Readers of documents: text, JSON lines, Parquet, or folders of these."""

import codecs
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import IO, Any

import msgspec

from manifold_hc.data.source_files import COMPRESSIONS, Format, list_files
from manifold_hc.errors import DataError

ROWS = 1024
"""Rows of a Parquet file that are read at a time."""

CHUNK = 1_000_000
"""Bytes of a text file that are read at a time."""

SEE_KEY = "see data.text_key (mhc tokenize --text-key)"

Document = Iterable[str]
"""Text of a document in one or more chunks, so that a file need not fit into memory."""

Advance = Callable[[int], object]
"""Progress callback: takes the number of bytes read since its last call."""


class BrokenRowError(DataError):
    """A row or text that is not valid, in a file that can be read."""

    def __init__(self, location: str, reason: str, problem: str) -> None:
        """location: file and line; reason: kind of problem, to count; problem: the message."""
        super().__init__(
            f"data: {problem}; data.skip_broken=true (mhc tokenize --skip-broken) leaves it out"
        )
        self.location = location
        self.reason = reason


class Skipped:
    """Count of broken rows that were skipped, by reason, and location of the first."""

    def __init__(self, *, allowed: bool) -> None:
        """allowed: True to skip broken rows, False to raise the error of the first one."""
        self.allowed = allowed
        self.reasons = Counter[str]()
        self.first = ""

    def add(self, row: BrokenRowError) -> None:
        """Count a broken row, or raise its error if skipping is not allowed."""
        if not self.allowed:
            raise row
        self.first = self.first or row.location
        self.reasons[row.reason] += 1

    def __str__(self) -> str:
        """Return a summary in one line."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())
        count = self.reasons.total()
        return f"broken rows left out: {count} ({reasons}), the first is {self.first}"


def documents(
    path: Path,
    text_key: str = "text",
    skipped: Skipped | None = None,
    advance: Advance = lambda _: None,
    listed: list[Path] | None = None,
) -> Iterator[Document]:
    """Yield the documents at `path`: one a text file, a JSON line or a row of Parquet.

    The files of a folder are read in the order of their names. Files may be compressed (.gz, .bz2,
    .xz; .zst with Python 3.14 or newer). Empty documents are left out. A document must be read
    before the next one is requested.

    Args:
        path: a file or a folder.
        text_key: key of the text in JSON lines, column of the text in Parquet.
        skipped: counts broken rows, if it allows them; by default the first one is an error.
        advance: progress callback.
        listed: result of `list_files(path)`, if it is known.

    Raises:
        DataError: with file and line, for a file that is missing, unreadable, broken or binary.
    """
    skipped = skipped or Skipped(allowed=False)
    readers = {"text": _text, "lines": _json_lines, "parquet": _parquet}
    found = False
    for file in list_files(path) if listed is None else listed:
        reader = readers[Format.of(file).kind or "text"]
        for document in reader(file, text_key, skipped, advance):
            found = True
            yield document
    if not found and skipped.reasons:
        raise DataError(f"data: {path} has no row that can be read: {skipped}")
    if not found:
        raise DataError(f"data: {path} is empty; give another text")


def _text(file: Path, _: str, skipped: Skipped, advance: Advance) -> Iterator[Document]:
    """Yield the one document of a text file, unless it is empty."""
    if skipped.allowed and file.is_file():
        try:
            for _chunk in _chunks(file, lambda _: None):
                pass
        except BrokenRowError as error:
            skipped.add(error)
            advance(file.stat().st_size)
            return
    chunks = _chunks(file, advance)
    start = ""
    for chunk in chunks:
        start += chunk
        if start.strip():
            yield chain([start], chunks)
            return


def _chunks(file: Path, advance: Advance) -> Iterator[str]:
    """Yield the text of a file in chunks; BrokenRowError for a byte that is not text."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    read = lines = 0
    with _open(file, advance) as (content, report):
        while True:
            data = content.read(CHUNK)
            read, lines = read + len(data), lines + data.count(b"\n")
            text, unread = _decode(decoder, data)
            if unread:
                line = 1 + lines - unread.count(b"\n")
                raise _not_text(f"{file}, line {line}", read - len(unread), unread[0])
            report()
            if text:
                yield text
            if not data:
                return


def _decode(decoder: codecs.IncrementalDecoder, data: bytes) -> tuple[str, bytes]:
    """Return the text, and the bytes from the first one that is not text."""
    if (nul := data.find(b"\0")) >= 0:
        return "", data[nul:]
    try:
        return decoder.decode(data, final=not data), b""
    except UnicodeDecodeError as error:
        return "", error.object[error.start :]


def _not_text(location: str, offset: int, value: int) -> BrokenRowError:
    """Return the error for a byte of a text file that is not UTF-8."""
    problem = f"{location}: not UTF-8 text: the byte at offset {offset} is 0x{value:02x}"
    if value:
        repair = "convert a text in another encoding, as with iconv -f latin1 -t utf-8"
        return BrokenRowError(location, "not UTF-8", f"{problem}; {repair}")
    repair = "give a file that is not binary; convert UTF-16 with iconv -f utf-16 -t utf-8"
    return BrokenRowError(location, "binary", f"{problem}; {repair}")


def _json_lines(file: Path, key: str, skipped: Skipped, advance: Advance) -> Iterator[Document]:
    with _open(file, advance) as (lines, report):
        for number, line in enumerate(lines, start=1):
            line = line.removeprefix(codecs.BOM_UTF8)
            report()
            if not line.strip():
                continue
            try:
                text = _json_text(line, key, f"{file}, line {number}")
            except BrokenRowError as error:
                skipped.add(error)
                continue
            if text:
                yield (text,)


def _json_text(line: bytes, key: str, location: str) -> str:
    """Return the text of one JSON line."""
    try:
        record = _decode_json(line)
    except UnicodeDecodeError:
        problem = f"{location}: not valid JSON: it is not UTF-8"
        raise BrokenRowError(location, "no JSON", problem) from None
    except (msgspec.MsgspecError, RecursionError) as error:
        raise BrokenRowError(location, "no JSON", f"{location}: not valid JSON: {error}") from None
    if not isinstance(record, dict):
        problem = f"{location}: must be an object with the key {key!r}"
        raise BrokenRowError(location, "no objects", problem)
    text = record.get(key)
    if not isinstance(text, str):
        state = "is no text" if key in record else f"is missing; there are {', '.join(record)}"
        problem = f"{location}: the key {key!r} {state}; {SEE_KEY}"
        raise BrokenRowError(location, "without a text", problem)
    return _validate(text, location)


def _decode_json(line: bytes) -> Any:
    """Decode a JSON value; unpaired surrogates, NaN and numbers of any length are allowed."""
    try:
        return msgspec.json.decode(line)
    except msgspec.MsgspecError:
        try:
            return json.loads(line.decode(), parse_int=float)
        except ValueError:
            pass
        raise


def _parquet(file: Path, key: str, skipped: Skipped, advance: Advance) -> Iterator[Document]:
    if suffix := Format.of(file).compression:
        raise DataError(f"data: {file} is Parquet inside {suffix}, which is not read; unpack it")
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
                    f"data: {file} has no column {key!r} but {', '.join(names)}; {SEE_KEY}"
                )
            size = file.stat().st_size / max(1, table.metadata.num_rows)
            row = 0
            for batch in table.iter_batches(ROWS, columns=[key]):
                for text in _values(batch.column(0)):
                    row += 1
                    location = f"{file}, row {row}"
                    try:
                        if not isinstance(text, str):
                            problem = f"{location}: {key!r} is no text"
                            raise BrokenRowError(location, "without a text", problem)
                        text = _validate(text, location)
                    except BrokenRowError as error:
                        skipped.add(error)
                        continue
                    if text:
                        yield (text,)
                advance(round(size * len(batch)))
    except (ArrowException, OSError) as error:
        raise DataError(f"data: {file} cannot be read as Parquet: {error}") from None


def _values(column: Any) -> Iterator[Any]:
    """Yield the values of a column; None for one that is not UTF-8, which Parquet allows."""
    try:
        yield from column.to_pylist()
        return
    except UnicodeDecodeError:
        pass
    for value in column:
        try:
            yield value.as_py()
        except UnicodeDecodeError:
            yield None


@contextmanager
def _open(file: Path, advance: Advance) -> Iterator[tuple[IO[bytes], Callable[[], None]]]:
    """Open a file, decompressed; yields it and a function that reports progress to `advance`."""
    suffix = Format.of(file).compression
    try:
        library = import_module(COMPRESSIONS[suffix]) if suffix else None
    except ImportError:
        raise DataError(
            f"data: {file} is packed as {suffix}, which this Python does not read; unpack it"
        ) from None
    damaged = (EOFError, zlib.error, lzma.LZMAError, getattr(library, "ZstdError", EOFError))
    try:
        with file.open("rb") as raw:
            seekable, reported = raw.seekable(), 0

            def report(least: int = CHUNK) -> None:
                nonlocal reported
                if seekable and (position := raw.tell()) >= reported + least:
                    advance(position - reported)
                    reported = position

            yield library.open(raw, "rb") if library else raw, report
            report(least=0)
    except damaged as error:
        raise DataError(f"data: {file} is damaged, it cannot be unpacked: {error}") from None
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"data: {file} cannot be read: {reason}") from error


def _validate(text: str, location: str) -> str:
    """Return the text if it is valid: UTF-8 can encode it, and it has no NUL.

    NUL is the boundary token of the byte tokenizer.
    """
    try:
        text.encode("utf-8")
    except UnicodeError:
        problem = f"{location}: the text has half a surrogate pair, which is no character"
        raise BrokenRowError(location, "with half a surrogate pair", problem) from None
    if "\0" in text:
        problem = f"{location}: the text is binary, it has a NUL character"
        raise BrokenRowError(location, "binary", problem)
    return text
