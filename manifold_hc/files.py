"""Files that are whole or not there."""

import errno
import glob
import logging
import os
import secrets
import stat
import time
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path

import platformdirs

logger = logging.getLogger("manifold_hc")

PATIENCE = 600.0
"""Seconds that the end of a run waits for room on the disk."""

WAIT = 10.0
"""Seconds between two attempts."""

SLICES = 20
"""Times that somebody is listened to in between."""

PERMANENT = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
}
"""Errors of a place that cannot be written, which no waiting mends as it does a full disk."""


def cache_folder() -> Path:
    """The user's cache folder of this package."""
    return Path(platformdirs.user_cache_dir("manifold-hc", appauthor=False))


def is_utf8(text: str) -> bool:
    """Whether UTF-8 can hold the text: it has no half of a surrogate pair."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading.

    Raises OSError for everything else: opening a FIFO waits for a writer, for ever if none comes.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return path.open("rb")


def read_regular(path: Path) -> bytes:
    """The content of a file; OSError for a FIFO, a device, a socket or a folder."""
    with open_regular(path) as file:
        return file.read()


def is_permanent(error: OSError) -> bool:
    """Whether the place cannot be written, rather than has no room at the moment."""
    return error.errno in PERMANENT


def retry_write(write: Callable[[], None], what: str, give_up: Callable[[], object]) -> None:
    """Call `write` until the disk takes it, loudly.

    Its OSError is raised after `PATIENCE`, as soon as `give_up` says so, and at once for a place
    that cannot be written at all.
    """
    for left in range(int(PATIENCE / WAIT), -1, -1):
        try:
            write()
            return
        except OSError as error:
            if is_permanent(error) or not left or give_up():
                raise
            logger.error(
                "%s CANNOT BE WRITTEN: %s; trying again for %.0f s",
                what.upper(),
                error.strerror,
                left * WAIT,
            )
            for _ in range(SLICES):
                time.sleep(WAIT / SLICES)
                if give_up():
                    break


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write beside `path` under a temporary name, flush to disk, and rename over it.

    The file gets the umask's mode. A killed process leaves the temporary file, which
    `remove_temporaries` finds. Raises OSError, which names `path`, or for a file in the folder's
    place that, as NotADirectoryError.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        place = str(path.parent)
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), place) from None
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)
        raise


def remove_temporaries(*paths: Path) -> None:
    """Remove what killed writers of these files left; for the one process that may write them."""
    for path in paths:
        for left in path.parent.glob(f".{glob.escape(path.name)}.{'?' * 8}.tmp"):
            left.unlink(missing_ok=True)
