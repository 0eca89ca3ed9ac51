"""Compiles the C++ sources into one library.

Imports the standard library only: a wheel is built without PyTorch.
"""

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

SOURCES = Path(__file__).parent / "source"

FLAGS = (
    "-std=gnu++17",
    "-O3",
    "-fPIC",
    "-fopenmp",
    # These change no result; -ffast-math would lose NaN and infinity.
    "-fno-math-errno",
    "-fno-trapping-math",
)

LINES = 3
"""Number of lines of the compiler's output in an error message."""


class CompileError(Exception):
    """The compiler failed; the message holds the first lines of its output."""


def find_compiler() -> tuple[str, ...] | None:
    """Return the C++ compiler's command, $CXX before the usual names; None without a compiler."""
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        command = shlex.split(name or "")
        if command and shutil.which(command[0]):
            return tuple(command)
    return None


def compile_library(
    compiler: Sequence[str], target: Path, processor: Sequence[str], link: Sequence[str]
) -> None:
    """Compile all sources in parallel and link them; objects go to the folder of `target`.

    processor: compiler flags that name the instruction set, e.g. -march=x86-64-v3. link: flags of
    the link alone. Raises CompileError.
    """
    commands = {
        target.with_name(f"{source.stem}.o"): [*compiler, *FLAGS, *processor, "-c", str(source)]
        for source in sorted(SOURCES.glob("*.cpp"))
    }
    running = [
        subprocess.Popen([*command, "-o", str(out)], stderr=subprocess.PIPE, text=True)
        for out, command in commands.items()
    ]
    _require([(process.communicate()[1], process.returncode) for process in running], compiler)
    command = [*compiler, "-shared", *link, *map(str, commands), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    _require([(done.stderr, done.returncode)], compiler)


def _require(results: Sequence[tuple[str, int]], compiler: Sequence[str]) -> None:
    for complaint, status in results:
        if status:
            errors = [line for line in complaint.splitlines() if "error" in line]
            shown = "; ".join((errors or complaint.splitlines())[:LINES]) or f"status {status}"
            raise CompileError(f"the CPU kernels do not build with {shlex.join(compiler)}: {shown}")
