"""Atomic writes, repeated writes to a full disk, and reads of regular files only."""

import errno
import glob
import logging
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

import platformdirs

from manifold_hc.errors import ManifoldError

logger = logging.getLogger("manifold_hc")

PATIENCE = 600.0
"""Seconds for which `retry_write` repeats a failing write."""

WAIT = 10.0
"""Seconds between two attempts of `retry_write`."""

POLLS = 20
"""Calls of `give_up` between two attempts."""

PERMANENT = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
}
"""Error numbers of a path that stays unwritable; a full disk (ENOSPC) may become writable."""


def cache_folder() -> Path:
    """Return this package's folder in the user's cache folder."""
    return Path(platformdirs.user_cache_dir("manifold-hc", appauthor=False))


def is_utf8(text: str) -> bool:
    """Return True if UTF-8 can encode the text: it has no unpaired surrogate."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading.

    Raises OSError for any other kind of file: opening a FIFO would block until it has a writer.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return path.open("rb")


def read_regular(path: Path) -> bytes:
    """Return the content of a file; OSError for a FIFO, a device, a socket or a folder."""
    with open_regular(path) as file:
        return file.read()


def is_permanent(error: OSError) -> bool:
    """Return True if the path stays unwritable, False if a later write may succeed."""
    return error.errno in PERMANENT


def retry_write(write: Callable[[], None], name: str, give_up: Callable[[], object]) -> None:
    """Call `write` until it succeeds, and log an error for each failure.

    Raises the OSError of `write` after `PATIENCE` seconds, when `give_up` returns a true value, and
    at once for a path that stays unwritable. name: of the files, for the log.
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
                name.upper(),
                error.strerror,
                left * WAIT,
            )
            for _ in range(POLLS):
                time.sleep(WAIT / POLLS)
                if give_up():
                    break


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write to a temporary file in the same folder, flush to disk, and rename it to `path`.

    The file's mode follows the umask. A killed process leaves the temporary file, which
    `remove_temporaries` removes. Raises OSError with `path` as its filename, and NotADirectoryError
    if the parent is a file.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        parent = str(path.parent)
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), parent) from None
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


@contextmanager
def becoming(out: Path, temporary: Path, operation: str) -> Iterator[None]:
    """Rename the folder `temporary` to `out`, which may be an empty folder, once it is filled.

    An error in the body removes it. Raises ManifoldError, which begins with `operation`, if a file
    or folder cannot be written.
    """
    try:
        yield
        if out.is_dir():
            out.rmdir()
        temporary.rename(out)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise ManifoldError(f"{operation}: {out} cannot be written: {error.strerror}") from None
        raise


def remove_temporaries(*paths: Path) -> None:
    """Remove temporary files of `paths` left by killed processes.

    Only for the one process that may write these paths.
    """
    for path in paths:
        for temporary in path.parent.glob(f".{glob.escape(path.name)}.{'?' * 8}.tmp"):
            temporary.unlink(missing_ok=True)
