"""The files of a source, and what a folder holds besides."""

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

PACKED = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma", ".zst": "compression.zstd"}
"""Suffixes of compressed files, behind that of the text, and the module that reads them."""


class Format(NamedTuple):
    """How a file is read, by its name; upper and lower case are the same."""

    kind: str | None
    """text, lines or parquet; None for a suffix that is neither."""
    packed: str | None
    """The suffix of the compression."""

    @classmethod
    def of(cls, file: Path) -> "Format":
        """`x.jsonl.gz` is lines in gzip."""
        suffixes = [suffix.lower() for suffix in file.suffixes[-2:]]
        packed = suffixes.pop() if suffixes and suffixes[-1] in PACKED else None
        return cls(FORMATS.get(suffixes[-1]) if suffixes else None, packed)


def files(path: Path) -> list[Path]:
    """The file `path`, or the files in the folder `path` that have a known suffix, sorted.

    Linked folders belong to it; a folder that can be reached in two ways is read once, and not by
    a link where there is a way without. One line in the log counts what is left out. Raises
    DataError for what is missing or cannot be listed, and for a folder without any.
    """
    if not is_utf8(str(path)):
        raise DataError(f"data: the path {path} is not valid UTF-8; rename the file")
    if not path.exists():
        raise DataError(f"data: {path} does not exist; check the path")
    if not path.is_dir():
        known = Format.of(path)
        unpacked = path.with_suffix("") if known.packed else path
        if known.kind is None and unpacked.suffix:
            logger.info("data: %s is read as plain text, one document", path)
        return [path]
    found, left_out = _search(path)
    if not found and any(path.glob("shard-*.safetensors")):
        raise DataError(f"data: {path} holds shards without their shards.json; it is not whole")
    if not found:
        raise DataError(f"data: {path} is a folder without {', '.join(FORMATS)} files or shards")
    if left_out:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.most_common())
        logger.warning(
            "data: %s: %d files are read, %d are left out: %s",
            path,
            len(found),
            left_out.total(),
            reasons,
        )
    return sorted(found)


def _search(folder: Path) -> tuple[list[Path], Counter[str]]:
    """The files below `folder` that are read, and how many are not, by reason."""
    found, left_out = [], Counter[str]()
    folders, links, seen = deque([folder]), deque[Path](), set[tuple[int, int]]()
    while folders or links:
        here = folders.popleft() if folders else links.popleft()
        try:
            state = here.stat()
            if (state.st_dev, state.st_ino) in seen:
                continue
            seen.add((state.st_dev, state.st_ino))
            inside = sorted(os.scandir(here), key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"data: the folder {here} cannot be read: {error.strerror}") from None
        for entry in inside:
            file = here / entry.name
            if entry.is_dir():
                (links if entry.is_symlink() else folders).append(file)
            elif reason := _reason_against(file):
                left_out[reason] += 1
            else:
                found.append(file)
    return found, left_out


def _reason_against(file: Path) -> str | None:
    """Why a file of a folder is no text of the source."""
    if file.name.startswith("."):
        return "hidden"
    if Format.of(file).kind is None:
        return f"*{file.suffix.lower()}" if file.suffix else "without a suffix"
    if file.is_file():
        return None
    return "broken links" if file.is_symlink() else "no regular files"
