"""Documents as they lie on disk: text, JSON lines, Parquet, or folders of these."""

import codecs
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import IO, Any

import msgspec

from manifold_hc.data.source_files import PACKED, Format, files
from manifold_hc.errors import DataError

ROWS = 1024
"""Rows of a Parquet file that are held at a time."""

STRETCH = 1_000_000
"""Bytes of a text file that are held at a time."""

SEE_KEY = "see data.text_key (mhc tokenize --text-key)"

Document = Iterable[str]
"""A document's text in one or more stretches, so that no file need fit into memory."""

Advance = Callable[[int], object]
"""Is told how many bytes of a file were read since it was told last."""


class BrokenRowError(DataError):
    """A row or text that cannot be read, though its file can."""

    def __init__(self, place: str, reason: str, problem: str) -> None:
        """place: file and line; reason: short, the same for all of its kind; problem: whole."""
        super().__init__(
            f"data: {problem}; data.skip_broken=true (mhc tokenize --skip-broken) leaves it out"
        )
        self.place = place
        self.reason = reason


class Skipped:
    """Broken rows that were left out: how many, why, and where the first is."""

    def __init__(self, *, allowed: bool) -> None:
        """allowed: whether rows may be left out; the first broken one is raised if not."""
        self.allowed = allowed
        self.reasons = Counter[str]()
        self.first = ""

    def add(self, row: BrokenRowError) -> None:
        """Count a row, or raise its error."""
        if not self.allowed:
            raise row
        self.first = self.first or row.place
        self.reasons[row.reason] += 1

    def __str__(self) -> str:
        """One line for people."""
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
    """The documents at `path`: a text file is one, a JSON line or a row of Parquet is one.

    A folder gives those of all its files in the order of their names. Files may be compressed
    (.gz, .bz2, .xz; .zst from Python 3.14 on). Empty documents are left out. A document must be
    read before the next one is asked for.

    skipped: takes rows that are broken, if it may; without, the first is an error.
    listed: what `files` gives for `path`, where it has been asked.
    Raises DataError, with file and line, for what is missing, unreadable, broken or binary.
    """
    skipped = skipped or Skipped(allowed=False)
    readers = {"text": _text, "lines": _json_lines, "parquet": _parquet}
    found = False
    for file in files(path) if listed is None else listed:
        reader = readers[Format.of(file).kind or "text"]
        for document in reader(file, text_key, skipped, advance):
            found = True
            yield document
    if not found and skipped.reasons:
        raise DataError(f"data: {path} has no row that can be read: {skipped}")
    if not found:
        raise DataError(f"data: {path} is empty; give another text")


def _text(file: Path, _: str, skipped: Skipped, advance: Advance) -> Iterator[Document]:
    """The one document of a text file, unless it is empty."""
    if skipped.allowed and file.is_file():
        try:
            for _stretch in _stretches(file, lambda _: None):
                pass
        except BrokenRowError as error:
            skipped.add(error)
            advance(file.stat().st_size)
            return
    stretches = _stretches(file, advance)
    before = ""
    for stretch in stretches:
        before += stretch
        if before.strip():
            yield _chained(before, stretches)
            return


def _chained(first: str, others: Iterator[str]) -> Iterator[str]:
    yield first
    yield from others


def _stretches(file: Path, advance: Advance) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    read = lines = 0
    with _opened(file, advance) as (content, report):
        while True:
            block = content.read(STRETCH)
            read, lines = read + len(block), lines + block.count(b"\n")
            text, unread = _decoded(decoder, block)
            if unread:
                line = 1 + lines - unread.count(b"\n")
                raise _not_text(f"{file}, line {line}", read - len(unread), unread[0])
            report()
            if text:
                yield text
            if not block:
                return


def _decoded(decoder: codecs.IncrementalDecoder, block: bytes) -> tuple[str, bytes]:
    """The text of a block, and its bytes from the first one on that is no text."""
    if (nul := block.find(b"\0")) >= 0:
        return "", block[nul:]
    try:
        return decoder.decode(block, final=not block), b""
    except UnicodeDecodeError as error:
        return "", error.object[error.start :]


def _not_text(place: str, offset: int, value: int) -> BrokenRowError:
    problem = f"{place}: not UTF-8 text: the byte at offset {offset} is 0x{value:02x}"
    if value:
        repair = "convert a text in another encoding, as with iconv -f latin1 -t utf-8"
        return BrokenRowError(place, "not UTF-8", f"{problem}; {repair}")
    repair = "give a file that is not binary; convert UTF-16 with iconv -f utf-16 -t utf-8"
    return BrokenRowError(place, "binary", f"{problem}; {repair}")


def _json_lines(file: Path, key: str, skipped: Skipped, advance: Advance) -> Iterator[Document]:
    with _opened(file, advance) as (lines, report):
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


def _json_text(line: bytes, key: str, place: str) -> str:
    """The text of one line."""
    try:
        record = _record(line)
    except UnicodeDecodeError:
        problem = f"{place}: not valid JSON: it is not UTF-8"
        raise BrokenRowError(place, "no JSON", problem) from None
    except (msgspec.MsgspecError, RecursionError) as error:
        raise BrokenRowError(place, "no JSON", f"{place}: not valid JSON: {error}") from None
    if not isinstance(record, dict):
        problem = f"{place}: must be an object with the key {key!r}"
        raise BrokenRowError(place, "no objects", problem)
    text = record.get(key)
    if not isinstance(text, str):
        state = "is no text" if key in record else f"is missing; there are {', '.join(record)}"
        problem = f"{place}: the key {key!r} {state}; {SEE_KEY}"
        raise BrokenRowError(place, "without a text", problem)
    return _clean(text, place)


def _record(line: bytes) -> Any:
    """A JSON value; half a surrogate pair, NaN and numbers of any length are let through."""
    try:
        return msgspec.json.decode(line)
    except msgspec.MsgspecError:
        try:
            return json.loads(line.decode(), parse_int=float)
        except ValueError:
            pass
        raise


def _parquet(file: Path, key: str, skipped: Skipped, advance: Advance) -> Iterator[Document]:
    if packed := Format.of(file).packed:
        raise DataError(f"data: {file} is Parquet inside {packed}, which is not read; unpack it")
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
                    place = f"{file}, row {row}"
                    try:
                        if not isinstance(text, str):
                            problem = f"{place}: {key!r} is no text"
                            raise BrokenRowError(place, "without a text", problem)
                        text = _clean(text, place)
                    except BrokenRowError as error:
                        skipped.add(error)
                        continue
                    if text:
                        yield (text,)
                advance(round(size * len(batch)))
    except (ArrowException, OSError) as error:
        raise DataError(f"data: {file} cannot be read as Parquet: {error}") from None


def _values(column: Any) -> Iterator[Any]:
    """Values of a column; None for one that is no UTF-8, which Parquet does not rule out."""
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
def _opened(file: Path, advance: Advance) -> Iterator[tuple[IO[bytes], Callable[[], None]]]:
    """The content of a file, unpacked, and what tells `advance` how far it is."""
    packed = Format.of(file).packed
    try:
        library = import_module(PACKED[packed]) if packed else None
    except ImportError:
        raise DataError(
            f"data: {file} is packed as {packed}, which this Python does not read; unpack it"
        ) from None
    damages = (EOFError, zlib.error, lzma.LZMAError, getattr(library, "ZstdError", EOFError))
    try:
        with file.open("rb") as raw:
            seekable, told = raw.seekable(), 0

            def report(least: int = STRETCH) -> None:
                nonlocal told
                if seekable and (position := raw.tell()) >= told + least:
                    advance(position - told)
                    told = position

            yield library.open(raw, "rb") if library else raw, report
            report(least=0)
    except damages as error:
        raise DataError(f"data: {file} is damaged, it cannot be unpacked: {error}") from None
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"data: {file} cannot be read: {reason}") from error


def _clean(text: str, place: str) -> str:
    """Text without NUL, which is the boundary between documents of bytes, that UTF-8 can hold."""
    try:
        text.encode("utf-8")
    except UnicodeError:
        problem = f"{place}: the text has half a surrogate pair, which is no character"
        raise BrokenRowError(place, "with half a surrogate pair", problem) from None
    if "\0" in text:
        problem = f"{place}: the text is binary, it has a NUL character"
        raise BrokenRowError(place, "binary", problem)
    return text
