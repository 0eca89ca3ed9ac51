"""A wheel's libraries: choice by processor, required symbols, and damaged files."""

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import manifold_hc
from manifold_hc.kernels.cpu import build, prebuilt
from manifold_hc.kernels.cpu.build import library as loaded_once
from manifold_hc.kernels.cpu.compiler import compile_library, find_compiler

hatch_build = pytest.importorskip("hatch_build", reason="hatchling is not installed")

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

HASWELL = (
    "fpu sse sse2 pni ssse3 fma cx16 movbe popcnt sse4_1 sse4_2 xsave avx f16c lahf_lm abm bmi1 "
    "avx2 bmi2"
)
KNIGHTS_LANDING = f"{HASWELL} avx512f avx512pf avx512er avx512cd"
SKYLAKE_SERVER = f"{HASWELL} avx512f avx512dq avx512cd avx512bw avx512vl"
ZEN_4 = f"{SKYLAKE_SERVER} avx512_bf16 avx512_vnni"

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")
needs_linux = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="wheels with libraries are for Linux with glibc"
)


@pytest.mark.parametrize(
    ("machine", "flags", "name"),
    [
        ("x86_64", "fpu sse sse2 pni ssse3 cx16 popcnt sse4_1 sse4_2 lahf_lm", None),
        ("x86_64", HASWELL, "x86-64-v3"),
        ("x86_64", KNIGHTS_LANDING, "x86-64-v3"),
        ("x86_64", SKYLAKE_SERVER, "x86-64-v4"),
        ("x86_64", f"{HASWELL} avx512_bf16", "x86-64-v3"),
        ("x86_64", ZEN_4, "x86-64-v4-bf16"),
        ("aarch64", "fp asimd evtstrm aes", "aarch64"),
        ("aarch64", "fp", None),
        ("riscv64", ZEN_4, None),
        ("x86_64", "", None),
    ],
)
def test_the_fastest_library_that_the_processor_runs(machine, flags, name):
    variant = prebuilt.fitting(machine, frozenset(flags.split()))
    assert (variant and variant.name) == name


@pytest.mark.parametrize("missing", HASWELL.split()[3:])
def test_a_processor_without_one_of_the_features(missing):
    assert prebuilt.fitting("x86_64", set(ZEN_4.split()) - {missing}) is None


def test_features_are_those_of_all_processors():
    cpuinfo = "processor\t: 0\nflags\t\t: fpu avx avx2\nvmx flags\t: fma\n\nflags\t\t: fpu avx\n"
    assert prebuilt.processor_features(cpuinfo) == {"fpu", "avx"}
    assert prebuilt.processor_features("Features\t: fp asimd\n") == {"fp", "asimd"}
    assert prebuilt.processor_features("") == frozenset()


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs a compiler for x86-64")
@pytest.mark.parametrize("variant", [v for v in prebuilt.VARIANTS if v.machine == "x86_64"])
def test_features_are_all_that_the_compiler_may_use(variant):
    """An instruction missing from the table would kill the process."""

    def macros(*flags):
        command = [*find_compiler(), *flags, "-dM", "-E", "-x", "c++", "/dev/null"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return {line.split()[1].strip("_") for line in text.splitlines()}

    linux = {
        "SSE3": "pni",
        "LZCNT": "abm",
        "LAHF_SAHF": "lahf_lm",
        "BMI": "bmi1",
        "CRC32": "sse4_2",
        "GCC_HAVE_SYNC_COMPARE_AND_SWAP_16": "cx16",
        "AVX512BF16": "avx512_bf16",
    }
    no_instructions = ("FP_FAST", "EVEX", "tune", "k8")
    made = macros(*variant.flags) - macros("-march=x86-64")
    made = {name for name in made if not name.startswith(no_instructions)}
    assert {"AVX2", "FMA"} <= made
    assert {linux.get(name, name.lower()) for name in made} <= variant.features


def checksummed(library):
    library.with_suffix(".sha256").write_text(hashlib.sha256(library.read_bytes()).hexdigest())
    return library


@pytest.fixture
def library(compiler, tmp_path):
    """This machine's kernels, linked as for a wheel."""
    target = tmp_path / "linked" / "x86-64-v4.so"
    target.parent.mkdir()
    compile_library([str(compiler)], target, [build.NATIVE], hatch_build.LINK)
    return checksummed(target)


USE = """
import logging
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
import torch
from manifold_hc import functional

def runtimes():
    lines = open("/proc/self/maps").read().splitlines()
    return {line.split()[-1] for line in lines if "omp" in line.rpartition("/")[2]}

before = runtimes()
u = functional.read(torch.ones(2, 300, 4, 8), torch.ones(2, 300, 4), "cpu")
print(u.sum().item(), before == runtimes() != set())
"""


@needs_compiler
@needs_linux
def test_a_wheel_without_compiler_or_openmp(library, tmp_path):
    """Nothing is compiled or written, and the threads are PyTorch's own."""
    package = tmp_path / "installed" / "manifold_hc"
    shutil.copytree(Path(manifold_hc.__file__).parent, package)
    folder = package / prebuilt.FOLDER.relative_to(Path(manifold_hc.__file__).parent)
    folder.mkdir()
    for variant in prebuilt.VARIANTS:
        checksummed(shutil.copy(library, folder / f"{variant.name}.so"))
    environment = {
        **os.environ,
        "CXX": "",
        "PATH": str(tmp_path / "empty"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PYTHONPATH": str(package.parent),
    }

    def used():
        return subprocess.run(
            [sys.executable, "-c", USE],
            **{"env": environment, "cwd": tmp_path, "capture_output": True, "text": True},
        )

    answer = used()
    assert answer.stdout.split() == ["19200.0", "True"], answer.stderr
    fits = prebuilt.fitting(
        platform.machine(), prebuilt.processor_features(Path("/proc/cpuinfo").read_text())
    )
    assert f"INFO the CPU kernels are the wheel's own for {fits.name}" in answer.stderr
    assert not (tmp_path / "cache").exists()
    (folder / f"{fits.name}.so").write_bytes(library.read_bytes()[:5000])
    answer = used()
    assert f"WARNING {folder / fits.name}.so cannot be used" in answer.stderr
    assert 'backend "cpu" is not there: the CPU kernels need a C++ compiler' in answer.stderr


@needs_compiler
@needs_linux
def test_what_a_wheels_library_needs(library):
    """No OpenMP runtime, and glibc alone decides the systems that it runs on."""
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True)
    assert "libstdc++.so.6" in needed.stdout
    assert "omp" not in needed.stdout
    prefix, major, minor, machine = hatch_build.platform_tag([library]).split("_", 3)
    assert (prefix, major, machine) == ("manylinux", "2", platform.machine())
    assert 28 <= int(minor) <= int(platform.libc_ver()[1].split(".")[1])


@needs_compiler
@needs_linux
def test_the_tag_of_symbols_that_older_systems_lack(library, tmp_path, monkeypatch):
    def compiled(name, source):
        (tmp_path / f"{name}.cpp").write_text(source)
        target = tmp_path / f"{name}.so"
        command = [*find_compiler(), "-shared", "-fPIC", target.with_suffix(".cpp"), "-o", target]
        subprocess.run(command, check=True)
        return target

    source = 'extern "C" int GOMP_parallel(), memset(...); int f() { return NAMES; }'
    old = compiled("old", source.replace("NAMES", "GOMP_parallel() + memset(0)"))
    assert hatch_build.platform_tag([old]) == f"manylinux_2_28_{platform.machine()}"
    newest = hatch_build.platform_tag([library])
    assert hatch_build.platform_tag([old, library]) == newest
    with pytest.raises(SystemExit, match=r"OpenMP is not the one .* set CXX=g\+\+"):
        hatch_build.platform_tag([compiled("other", source.replace("NAMES", "memset(0)"))])
    monkeypatch.setitem(hatch_build.NEWEST, "CXXABI", (1, 3, 10))
    with pytest.raises(SystemExit, match=r"need CXXABI_1\.3\.11, .* an older g\+\+"):
        hatch_build.platform_tag([library])


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """A folder of libraries in place of the wheel's, and the file that this processor gets."""
    monkeypatch.setattr(prebuilt, "FOLDER", tmp_path / "lib")
    assert prebuilt.find() is None
    prebuilt.FOLDER.mkdir()
    if (found := prebuilt.find()) is None:
        pytest.skip("wheels have no library for this processor")
    return found


def damaged(how, library, target):
    if how == "missing":
        return
    shutil.copy(library, target)
    checksummed(target)
    if how == "cut":
        target.write_bytes(library.read_bytes()[: library.stat().st_size // 2])
    elif how == "no checksum":
        target.with_suffix(".sha256").unlink()
    elif how == "not a library":
        target.write_text("a library")
        checksummed(target)
    elif how == "unknown symbol":
        source = target.with_suffix(".cpp")
        source.write_text('extern "C" void of_no_library(); void f() { of_no_library(); }')
        subprocess.run([*find_compiler(), "-shared", "-fPIC", source, "-o", target], check=True)
        checksummed(target)


@needs_compiler
@pytest.mark.parametrize(
    "how", ["whole", "missing", "cut", "no checksum", "not a library", "unknown symbol"]
)
def test_a_library_that_cannot_be_used_is_built(wheels, how, caplog):
    own = build._load_or_build()
    caplog.clear()
    damaged(how, Path(own._name), wheels)
    caplog.set_level(logging.INFO)
    loaded = loaded_once.__wrapped__()
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    if how == "whole":
        assert (loaded._name, warnings) == (str(wheels), [])
    else:
        assert loaded._name == own._name
        (warning,) = warnings
        assert warning.startswith(f"{wheels} cannot be used, so the CPU kernels are built: ")


@needs_compiler
@needs_linux
@pytest.mark.wide
def test_the_contract_with_every_library_of_a_wheel(tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    subprocess.run(
        [*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(ROOT)],
        env={**os.environ, "HATCH_BUILD_HOOK_ENABLE_CUSTOM": "true"},
        check=True,
    )
    (wheel,) = tmp_path.glob("*-py3-none-manylinux_*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    folder = tmp_path / prebuilt.FOLDER.relative_to(ROOT)
    variants = [v for v in prebuilt.VARIANTS if v.machine == platform.machine()]
    names = {f"{v.name}.{suffix}" for v in variants for suffix in ("so", "sha256")}
    assert {path.name for path in folder.iterdir()} == names
    features = prebuilt.processor_features(Path("/proc/cpuinfo").read_text())
    runnable = [v for v in variants if v.features <= features]
    for variant in runnable:
        library = folder / f"{variant.name}.so"
        command = [sys.executable, "-m", "pytest", "-q", "tests/kernels/test_contract.py"]
        answer = subprocess.run(
            [*command, "-k", "cpu", f"--cpu-library={library}"],
            **{"cwd": ROOT, "capture_output": True, "text": True},
        )
        assert answer.returncode == 0, answer.stdout[-3000:] + answer.stderr
        assert " passed" in answer.stdout
