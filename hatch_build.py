"""Build hook: add compiled CPU kernels to a wheel, one library for each instruction set.

The hook runs only with HATCH_BUILD_HOOK_ENABLE_CUSTOM=true, as `make wheel` sets it: every other
installation needs no compiler and makes a wheel of Python alone.
"""

import hashlib
import importlib.util
import platform
import re
import subprocess
import tempfile
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

CPU = Path("manifold_hc", "kernels", "cpu")

# Stripped, and without -fopenmp: OpenMP functions come from the runtime that PyTorch has loaded.
LINK = ("-s",)

# Every system with glibc 2.28 or newer has a libstdc++ of GCC 8 or newer.
NEWEST = {"GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11)}


class CustomBuildHook(BuildHookInterface):
    """Compiles the CPU kernels before the wheel is packed."""

    def initialize(self, version, build_data):
        """Add the libraries with their checksums, and name the platform they run on."""
        if version == "editable":
            return
        self.folder = tempfile.TemporaryDirectory()
        libraries = build(Path(self.root), Path(self.folder.name))
        for library in libraries:
            checksum = library.with_suffix(".sha256")
            checksum.write_text(hashlib.sha256(library.read_bytes()).hexdigest())
            for file in (library, checksum):
                build_data["force_include"][str(file)] = str(CPU / "lib" / file.name)
        build_data["pure_python"] = False
        # No symbol of Python's: one wheel serves every version.
        build_data["tag"] = f"py3-none-{platform_tag(libraries)}"

    def finalize(self, version, build_data, artifact_path):
        """Remove the libraries: the wheel contains them."""
        if version != "editable":
            self.folder.cleanup()


def build(root, folder):
    """Compile the libraries of this machine's architecture into `folder`."""
    compiling, prebuilt = (module(root / CPU / name) for name in ("compiler.py", "prebuilt.py"))
    variants = [v for v in prebuilt.VARIANTS if v.machine == platform.machine()]
    if platform.libc_ver()[0] != "glibc" or not variants:
        raise SystemExit(
            "a wheel with CPU kernels is made on Linux with glibc, on x86_64 or aarch64, but this "
            f"is {platform.platform()}; leave out HATCH_BUILD_HOOK_ENABLE_CUSTOM"
        )
    compiler = compiling.find_compiler()
    if compiler is None:
        raise SystemExit("a wheel with CPU kernels needs a C++ compiler; install g++ or set CXX")
    made = []
    for variant in variants:
        made.append(folder / f"{variant.name}.so")
        compiling.compile_library(compiler, made[-1], variant.flags, LINK)
    return made


def module(path):
    """Load a file of the package as a module; the package itself would need PyTorch."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def platform_tag(libraries):
    """Return the PEP 600 tag of the oldest glibc with every symbol that the libraries need."""
    command = ["objdump", "-T", *map(str, libraries)]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if "GOMP_parallel" not in symbols:
        raise SystemExit("this compiler's OpenMP is not the one of PyTorch's wheels; set CXX=g++")
    needed = {}
    for name, version in re.findall(r"\b(GLIBC|GLIBCXX|CXXABI)_([\d.]+)", symbols):
        numbers = tuple(map(int, version.split(".")))
        needed[name] = max(needed.get(name, ()), numbers)
    for name, newest in NEWEST.items():
        if needed.get(name, ()) > newest:
            raise SystemExit(
                f"the CPU kernels need {name}_{'.'.join(map(str, needed[name]))}, which systems "
                "with an older libstdc++ lack; set CXX to an older g++"
            )
    major, minor = max(needed["GLIBC"], (2, 28))[:2]
    return f"manylinux_{major}_{minor}_{platform.machine()}"
