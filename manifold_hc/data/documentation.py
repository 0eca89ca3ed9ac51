"""Where training text comes from: a file, or the documentation that every Python carries."""

import ast
import hashlib
import logging
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import platformdirs

from manifold_hc.errors import DataError
from manifold_hc.files import write_atomically

logger = logging.getLogger("manifold_hc")

LONG = 200
"""Docstrings shorter than this many characters are left out."""

SMALLEST = 100_000
"""A cache below this many bytes is damaged."""

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


def load(path: str) -> np.ndarray:
    """The bytes of a UTF-8 text file as tokens [N] uint8; `path` "" is Python's documentation.

    Raises DataError for a file that is missing, a folder, unreadable, empty or binary.
    """
    content = documentation() if not path else _read(Path(path).expanduser())
    return np.frombuffer(content, dtype=np.uint8)


def cache_folder() -> Path:
    """The user's cache folder of this package."""
    return Path(platformdirs.user_cache_dir("manifold-hc", appauthor=False))


def documentation() -> bytes:
    """Python's language reference and the standard library's long docstrings, about 1.6 MB.

    Read from the installed sources without importing them; collected once a Python version and
    cached. The text differs from one Python version to the next.
    """
    version = ".".join(map(str, sys.version_info[:3]))
    cached = cache_folder() / f"python-{version}-documentation.txt"
    try:
        if len(content := cached.read_bytes()) >= SMALLEST:
            return content
    except OSError:
        pass
    logger.info("collecting Python's documentation into %s", cached)
    content = "\n\n".join(_topics() + _docstrings()).encode()
    try:
        write_atomically(cached, content)
    except OSError as error:
        logger.warning("the documentation is not cached: %s", error)
    return content


def fingerprint(tokens: np.ndarray) -> str:
    """SHA-256 of the tokens: which data a run was trained on."""
    return hashlib.sha256(tokens.tobytes()).hexdigest()


def _read(path: Path) -> bytes:
    if str(path).encode(errors="replace") != str(path).encode(errors="backslashreplace"):
        raise DataError(f"data: the path {path} is not valid UTF-8; rename the file")
    if not path.exists():
        raise DataError(f"data: {path} does not exist; give a text file with --data")
    if path.is_dir():
        raise DataError(f"data: {path} is a folder; give one text file with --data")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"data: {path} cannot be read: {error.strerror}") from error
    if not content.strip():
        raise DataError(f"data: {path} is empty; give a text file with --data")
    try:
        content.decode("utf-8")
        binary = b"\0" in content
    except UnicodeDecodeError:
        binary = True
    if binary:
        raise DataError(f"data: {path} is not UTF-8 text but binary; give a text file with --data")
    return content


def _topics() -> list[str]:
    from pydoc_data.topics import topics

    return [text for _, text in sorted(topics.items())]


def _docstrings() -> list[str]:
    """Long docstrings of the standard library's Python sources, in path order, each once."""
    found: dict[str, None] = {}
    for source in _sources(Path(sysconfig.get_path("stdlib"))):
        try:
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse(source.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue  # templates and deliberately broken examples
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) >= LONG:
                    found[text] = None
    return list(found)


def _sources(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name not in SKIPPED:
            yield from _sources(path)
        elif path.suffix == ".py":
            yield path
