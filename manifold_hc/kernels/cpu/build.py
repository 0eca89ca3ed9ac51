"""The compiled operators: a wheel's library, or one built once for this machine."""

import ctypes
import hashlib
import logging
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
from manifold_hc.kernels.cpu import prebuilt
from manifold_hc.kernels.cpu.compiler import (
    FLAGS,
    SOURCES,
    CompileError,
    compile_library,
    find_compiler,
)

logger = logging.getLogger("manifold_hc")

NATIVE = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"

UNFINISHED = "building-"
"""Prefix of a build's temporary folder."""


@cache
def library() -> ctypes.CDLL:
    """Return the compiled kernels: the wheel's for this processor, else those of an earlier build.

    Builds them on the first use.

    Raises BackendError when they must be built and there is no compiler, when it fails, or when the
    cache folder cannot be written; the message says which.
    """
    return _load_prebuilt() or _load_or_build()


def _load_prebuilt() -> ctypes.CDLL | None:
    """Return the wheel's library, if it has an undamaged one for this processor."""
    target = prebuilt.find()
    if target is None:
        return None
    try:
        # Linked without an OpenMP runtime: PyTorch makes its own visible to every library, so there
        # is one pool of threads, and no runtime to install.
        found = _load(target)
    except OSError as error:
        logger.warning("%s cannot be used, so the CPU kernels are built: %s", target, error)
        return None
    logger.info("the CPU kernels are the wheel's own for %s", target.stem)
    return found


def _load_or_build() -> ctypes.CDLL:
    compiler = find_compiler()
    if compiler is None:
        raise BackendError(
            "the CPU kernels need a C++ compiler, and none is found as $CXX, g++, clang++ or c++; "
            'install one, or use backend="reference"'
        )
    target = cache_folder() / "kernels" / _key(compiler) / "operators.so"
    try:
        return _load_cached(target) or _build(compiler, target)
    except OSError as error:
        raise BackendError(
            f"the CPU kernels cannot be kept in {target.parent}: {error}; "
            'set XDG_CACHE_HOME to a folder that can be written, or use backend="reference"'
        ) from error


def _key(compiler: tuple[str, ...]) -> str:
    """Return the hash of all inputs of a build: sources, torch, compiler, processor, flags."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False)
    parts = [
        *(f"{path.name}\n{path.read_text()}" for path in sorted(SOURCES.iterdir())),
        torch.__version__,
        shlex.join(compiler),
        version.stdout,
        _processor(),
        *FLAGS,
        NATIVE,
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _processor() -> str:
    """Return the processor's description, which -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    keys = ("model name", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(keys)))


def _load_cached(target: Path) -> ctypes.CDLL | None:
    """Return the library of an earlier build, if it exists and is undamaged."""
    if not target.exists():
        return None
    try:
        return _load(target)
    except OSError as error:
        logger.warning("%s is damaged and is built again: %s", target, error)
        return None


def _load(target: Path) -> ctypes.CDLL:
    """Load a library; raise OSError if it is damaged, as loading it would end the process."""
    if _checksum(target) != target.with_suffix(".sha256").read_text():
        raise OSError("its checksum is another")
    return ctypes.CDLL(str(target))


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _build(compiler: tuple[str, ...], target: Path) -> ctypes.CDLL:
    """Build the library; other processes wait for the first one and find its file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):
        if (found := _load_cached(target)) is not None:
            return found
        start = time.perf_counter()
        # A warning, which Python shows without any configuration: the program seems to hang.
        logger.warning(
            "building the CPU kernels with %s, once for this machine: 12 to 40 s", compiler[0]
        )
        for left in target.parent.glob(f"{UNFINISHED}*"):  # of killed builds
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=target.parent) as folder:
            built = Path(folder) / target.name
            try:
                compile_library(compiler, built, [NATIVE], ["-fopenmp"])
            except CompileError as error:
                repair = 'set CXX to another compiler, or use backend="reference"'
                raise BackendError(f"{error}; {repair}") from error
            # The checksum first, so that no library is without one.
            write_atomically(target.with_suffix(".sha256"), _checksum(built))
            built.replace(target)
        logger.info("built in %.0f s: %s", time.perf_counter() - start, target)
        return ctypes.CDLL(str(target))
