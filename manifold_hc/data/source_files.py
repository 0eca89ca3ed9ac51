"""Files of a source: their formats, and the search of a folder for them."""

import logging
import os
from collections import Counter, deque
from pathlib import Path
from typing import NamedTuple

from manifold_hc.errors import DataError
from manifold_hc.files import is_utf8

logger = logging.getLogger("manifold_hc")

FORMATS = {".txt": "text", ".jsonl": "lines", ".ndjson": "lines", ".parquet": "parquet"}
"""Suffixes that a folder is searched for; a single file of another suffix is read as text."""

COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma", ".zst": "compression.zstd"}
"""Suffixes of compressed files, after the suffix of the format, and the module that reads them."""


class Format(NamedTuple):
    """Format of a file, by its name; upper and lower case are the same."""

    kind: str | None
    """text, lines or parquet; None for any other suffix."""
    compression: str | None
    """Suffix of the compression."""

    @classmethod
    def of(cls, file: Path) -> "Format":
        """Return the format of a file: `x.jsonl.gz` is lines, compressed with gzip."""
        suffixes = [suffix.lower() for suffix in file.suffixes[-2:]]
        compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else None
        return cls(FORMATS.get(suffixes[-1]) if suffixes else None, compression)


def list_files(path: Path) -> list[Path]:
    """Return the file `path`, or the files in the folder `path` with a known suffix, sorted.

    Links to folders are followed; a folder that several paths lead to is read once, by a path
    without links if there is one. One log message counts the files that are skipped. Raises
    DataError for a path that is missing or cannot be listed, and for a folder without any file.
    """
    if not is_utf8(str(path)):
        raise DataError(f"data: the path {path} is not valid UTF-8; rename the file")
    if not path.exists():
        raise DataError(f"data: {path} does not exist; check the path")
    if not path.is_dir():
        known = Format.of(path)
        uncompressed = path.with_suffix("") if known.compression else path
        if known.kind is None and uncompressed.suffix:
            logger.info("data: %s is read as plain text, one document", path)
        return [path]
    found, skipped = _search(path)
    if not found and any(path.glob("shard-*.safetensors")):
        raise DataError(f"data: {path} holds shards without their shards.json; it is not whole")
    if not found:
        raise DataError(f"data: {path} is a folder without {', '.join(FORMATS)} files or shards")
    if skipped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.most_common())
        logger.warning(
            "data: %s: %d files are read, %d are left out: %s",
            path,
            len(found),
            skipped.total(),
            reasons,
        )
    return sorted(found)


def _search(folder: Path) -> tuple[list[Path], Counter[str]]:
    """Return the files below `folder` to read, and the number of skipped ones by reason."""
    found, skipped = [], Counter[str]()
    # Follow links last, so that a folder that is also reachable directly keeps its real path.
    folders, links, seen = deque([folder]), deque[Path](), set[tuple[int, int]]()
    while folders or links:
        current = folders.popleft() if folders else links.popleft()
        try:
            state = current.stat()
            if (state.st_dev, state.st_ino) in seen:
                continue
            seen.add((state.st_dev, state.st_ino))
            entries = sorted(os.scandir(current), key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(
                f"data: the folder {current} cannot be read: {error.strerror}"
            ) from None
        for entry in entries:
            file = current / entry.name
            if entry.is_dir():
                (links if entry.is_symlink() else folders).append(file)
            elif reason := _skip_reason(file):
                skipped[reason] += 1
            else:
                found.append(file)
    return found, skipped


def _skip_reason(file: Path) -> str | None:
    """Return the reason to skip a file of a folder, None for a file to read."""
    if file.name.startswith("."):
        return "hidden"
    if Format.of(file).kind is None:
        return f"*{file.suffix.lower()}" if file.suffix else "without a suffix"
    if file.is_file():
        return None
    return "broken links" if file.is_symlink() else "no regular files"
