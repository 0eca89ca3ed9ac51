"""The default text: the documentation that comes with every Python."""

import ast
import logging
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from manifold_hc.files import cache_folder, write_atomically

logger = logging.getLogger("manifold_hc")

LONG = 200
"""Characters of the shortest docstring that is taken."""

SMALLEST = 100_000
"""Bytes below which a cached text is damaged."""

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


def python_docs() -> str:
    """Return Python's language reference and the standard library's long docstrings, about 1.6 MB.

    The text is collected from the installed sources, without importing them, and cached for this
    Python version; it differs between versions.
    """
    version = ".".join(map(str, sys.version_info[:3]))
    cached = cache_folder() / f"python-{version}-documentation.txt"
    try:
        if len(content := cached.read_bytes()) >= SMALLEST:
            return content.decode()
    except (OSError, UnicodeDecodeError):
        pass
    logger.info("collecting Python's documentation into %s", cached)
    text = "\n\n".join(_topics() + _docstrings())
    try:
        write_atomically(cached, text)
    except OSError as error:
        logger.warning("the documentation is not cached: %s", error)
    return text


def _topics() -> list[str]:
    from pydoc_data.topics import topics

    return [text for _, text in sorted(topics.items())]


def _docstrings() -> list[str]:
    """Return the long docstrings of the standard library, in order of the paths, each once."""
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
