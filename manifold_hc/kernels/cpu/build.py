"""Builds the C++ sources once for this machine, into the user's cache folder."""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock

from manifold_hc.errors import BackendError
from manifold_hc.files import cache_folder, write_atomically

logger = logging.getLogger("manifold_hc")

SOURCES = Path(__file__).parent / "source"

NATIVE = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"

FLAGS = (
    "-std=gnu++17",
    "-O3",
    NATIVE,
    "-fPIC",
    "-fopenmp",
    # Neither changes a result; -ffast-math would lose NaN and infinity.
    "-fno-math-errno",
    "-fno-trapping-math",
)

LINES = 3
"""Lines of a compiler's complaint that an error repeats."""


@cache
def library() -> ctypes.CDLL:
    """The compiled operators, built if this machine has none yet.

    Raises BackendError when there is no compiler, when it fails, or when the cache folder cannot be
    written; the message says which.
    """
    compiler = find_compiler()
    if compiler is None:
        raise BackendError(
            "the CPU kernels need a C++ compiler, and none is found as $CXX, g++, clang++ or c++; "
            'install one, or use backend="reference"'
        )
    target = cache_folder() / "kernels" / _key(compiler) / "operators.so"
    try:
        return _loaded(target) or _built(compiler, target)
    except OSError as error:
        raise BackendError(
            f"the CPU kernels cannot be kept in {target.parent}: {error}; "
            'set XDG_CACHE_HOME to a folder that can be written, or use backend="reference"'
        ) from error


def find_compiler() -> tuple[str, ...] | None:
    """The C++ compiler's command, $CXX before the usual names; None without one."""
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        command = shlex.split(name or "")
        if command and shutil.which(command[0]):
            return tuple(command)
    return None


def _key(compiler: tuple[str, ...]) -> str:
    """Tells apart everything that makes another library: sources, torch, compiler, processor."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False)
    parts = [
        *(f"{path.name}\n{path.read_text()}" for path in sorted(SOURCES.iterdir())),
        torch.__version__,
        shlex.join(compiler),
        version.stdout,
        _processor(),
        *FLAGS,
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _processor() -> str:
    """What -march=native looks at."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    keys = ("model name", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(keys)))


def _loaded(target: Path) -> ctypes.CDLL | None:
    """The library, if it is there and whole: loading half of one would end the process."""
    if not target.exists():
        return None
    try:
        if _checksum(target) == target.with_suffix(".sha256").read_text():
            return ctypes.CDLL(str(target))
        reason = "its checksum is another"
    except OSError as error:
        reason = str(error)
    logger.warning("%s is damaged and is built again: %s", target, reason)
    return None


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _built(compiler: tuple[str, ...], target: Path) -> ctypes.CDLL:
    """One process builds; the others wait for it and find the file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):
        if (found := _loaded(target)) is not None:
            return found
        start = time.perf_counter()
        logger.info("building the CPU kernels with %s, once for this machine", compiler[0])
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            built = _compile(compiler, Path(folder))
            # First the checksum: where a library is, there is one.
            write_atomically(target.with_suffix(".sha256"), _checksum(built))
            built.replace(target)
        logger.info("built in %.0f s: %s", time.perf_counter() - start, target)
        return ctypes.CDLL(str(target))


def _compile(compiler: tuple[str, ...], folder: Path) -> Path:
    """All sources at the same time, then the link."""
    commands = {
        folder / f"{source.stem}.o": [*compiler, *FLAGS, "-c", str(source)]
        for source in sorted(SOURCES.glob("*.cpp"))
    }
    running = [
        subprocess.Popen([*command, "-o", str(out)], stderr=subprocess.PIPE, text=True)
        for out, command in commands.items()
    ]
    _require([(process.communicate()[1], process.returncode) for process in running], compiler)
    built = folder / "operators.so"
    link = [*compiler, "-shared", "-fopenmp", *map(str, commands), "-o", str(built)]
    done = subprocess.run(link, capture_output=True, text=True, check=False)
    _require([(done.stderr, done.returncode)], compiler)
    return built


def _require(results: list[tuple[str, int]], compiler: tuple[str, ...]) -> None:
    for complaint, status in results:
        if status:
            errors = [line for line in complaint.splitlines() if "error" in line]
            shown = "; ".join((errors or complaint.splitlines())[:LINES]) or f"status {status}"
            raise BackendError(
                f"the CPU kernels do not build with {shlex.join(compiler)}: {shown}; "
                'set CXX to another compiler, or use backend="reference"'
            )
