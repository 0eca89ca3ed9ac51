"""Building the CPU kernels: once for all processes, or an error with the reason."""

import os
import platform
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import manifold_hc
from manifold_hc.kernels.cpu import build

pytestmark = pytest.mark.slow

if build.find_compiler() is None:
    pytest.skip("needs a C++ compiler", allow_module_level=True)

USE = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
import torch
from manifold_hc import functional
x = torch.ones(2, 3, 8)
for _ in range(2):
    print(functional.read(x, torch.ones(2, 3), BACKEND).sum().item())
"""


QUIET = USE.replace(USE.splitlines()[2], "")


def use(backend="auto", program=USE, **environment):
    """Start one process that reads streams; its output and log when it ends."""
    variables = {**os.environ, **{name: str(value) for name, value in environment.items()}}
    command = [sys.executable, "-c", program.replace("BACKEND", repr(backend))]
    return subprocess.Popen(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finished(process):
    out, log = process.communicate(timeout=120)
    return process.returncode, out.split(), log


def compiled_files(tmp_path):
    return [line for line in (tmp_path / "calls").read_text().splitlines() if " -c " in line]


def test_many_processes_build_once(tmp_path, compiler):
    environment = {"CXX": compiler, "XDG_CACHE_HOME": tmp_path / "cache"}
    answers = [finished(p) for p in [use("cpu", **environment) for _ in range(3)]]
    assert [(status, out) for status, out, _ in answers] == [(0, ["48.0", "48.0"])] * 3
    assert len(compiled_files(tmp_path)) == len(list(build.SOURCES.glob("*.cpp")))
    announced = f"WARNING building the CPU kernels with {compiler}, once for this machine: 12 to"
    assert sum(log.count(announced) for _, _, log in answers) == 1
    # Nothing is left behind but the library, its checksum and the lock.
    folder = next((tmp_path / "cache" / "manifold-hc" / "kernels").iterdir())
    names = ["operators.lock", "operators.sha256", "operators.so"]
    assert sorted(path.name for path in folder.iterdir()) == names


def test_a_build_is_announced_without_any_logging_configuration(tmp_path, compiler):
    process = use("cpu", QUIET, CXX=compiler, XDG_CACHE_HOME=tmp_path / "cache")
    status, _, log = finished(process)
    announced = f"building the CPU kernels with {compiler}, once for this machine: 12 to 40 s"
    assert (status, log.splitlines()) == (0, [announced])


def test_what_a_killed_build_left_is_removed_by_the_next_one(tmp_path, compiler):
    script, killed = tmp_path / "killing-compiler", tmp_path / "killed"
    script.write_text(f"""#!/bin/sh
case " $* " in *" -c "*) [ -f {killed} ] || {{ touch {killed}; kill -9 $PPID; }} ;; esac
exec {compiler} "$@"
""")
    script.chmod(0o755)
    environment = {"CXX": script, "XDG_CACHE_HOME": tmp_path / "cache"}
    assert finished(use("cpu", **environment))[0] == -signal.SIGKILL
    folder = next((tmp_path / "cache" / "manifold-hc" / "kernels").iterdir())
    assert [path.is_dir() for path in folder.iterdir()].count(True) == 1
    assert finished(use("cpu", **environment))[:2] == (0, ["48.0", "48.0"])
    assert not any(path.is_dir() for path in folder.iterdir())


def test_an_installation_that_cannot_be_written(tmp_path, compiler):
    package = tmp_path / "installed" / "manifold_hc"
    shutil.copytree(Path(manifold_hc.__file__).parent, package)
    shutil.rmtree(package / "__pycache__", ignore_errors=True)
    before = contents(package)
    for path in [package, *package.rglob("*")]:
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    environment = {
        "CXX": compiler,
        "XDG_CACHE_HOME": tmp_path / "cache",
        "PYTHONPATH": package.parent,
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    assert finished(use("cpu", **environment))[:2] == (0, ["48.0", "48.0"])
    assert contents(package) == before


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_without_a_compiler_auto_says_so_once_and_takes_the_reference(tmp_path):
    environment = {"CXX": "", "PATH": tmp_path, "XDG_CACHE_HOME": tmp_path / "cache"}
    status, out, log = finished(use(**environment))
    assert (status, out) == (0, ["48.0", "48.0"])
    assert log.count("WARNING") == 1
    assert 'backend "auto": reference for float32 streams' in log
    assert "need a C++ compiler, and none is found as $CXX, g++, clang++ or c++" in log
    status, out, log = finished(use("cpu", **environment))
    assert (status, out) == (1, [])
    assert 'BackendError: read: backend "cpu" is not there: the CPU kernels need' in log


def test_a_compiler_that_fails_is_quoted(tmp_path):
    script = tmp_path / "broken"
    script.write_text("#!/bin/sh\necho vector.h: error: no such vector >&2\nexit 1\n")
    script.chmod(0o755)
    _, out, log = finished(use(CXX=script, XDG_CACHE_HOME=tmp_path / "cache"))
    assert out == ["48.0", "48.0"]
    assert "do not build with" in log
    assert "vector.h: error: no such vector" in log
    assert "set CXX to another compiler" in log
    folder = next((tmp_path / "cache" / "manifold-hc" / "kernels").iterdir())
    assert [path.name for path in folder.iterdir()] == ["operators.lock"]


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "cache").write_text("a file, where a folder should be")
    _, out, log = finished(use(XDG_CACHE_HOME=tmp_path / "cache"))
    assert out == ["48.0", "48.0"]
    assert "cannot be kept in" in log
    assert "set XDG_CACHE_HOME" in log


def test_a_damaged_library_is_built_again(tmp_path, compiler):
    """One that is cut in the middle would load, and end the process at the first call."""
    environment = {"CXX": compiler, "XDG_CACHE_HOME": tmp_path / "cache"}
    finished(use("cpu", **environment))
    (library,) = (tmp_path / "cache").rglob("operators.so")
    whole = library.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2]):
        library.unlink()
        library.write_bytes(damaged)
        status, out, log = finished(use("cpu", **environment))
        assert (status, out) == (0, ["48.0", "48.0"])
        assert "is damaged and is built again: its checksum is another" in log
        assert library.stat().st_size == len(whole)
    library.with_suffix(".sha256").unlink()
    assert finished(use("cpu", **environment))[:2] == (0, ["48.0", "48.0"])


def test_what_makes_another_library(monkeypatch, tmp_path):
    own = build.find_compiler()
    keys = [build._key(own)]
    with monkeypatch.context() as patch:
        patch.setattr(build, "_processor", lambda: "another")
        keys.append(build._key(own))
    with monkeypatch.context() as patch:
        patch.setattr(build.torch, "__version__", "0.0")
        keys.append(build._key(own))
    with monkeypatch.context() as patch:
        shutil.copytree(build.SOURCES, tmp_path / "source")
        (tmp_path / "source" / "vector.h").write_text("// changed")
        patch.setattr(build, "SOURCES", tmp_path / "source")
        keys.append(build._key(own))
    keys.append(build._key((*own, "-DNOTHING")))
    assert len(set(keys)) == len(keys)
    assert build._key(own) == keys[0]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64 processor")
@pytest.mark.wide  # test_prebuilt runs the contract for the libraries of a wheel
@pytest.mark.parametrize("processor", ["x86-64-v3", "x86-64"])
def test_the_contract_with_narrower_vectors(tmp_path, processor):
    """Every width of vector is another program; this processor may have a wider one."""
    real = shutil.which(build.find_compiler()[0])
    script = tmp_path / "compiler"
    script.write_text(f'#!/bin/bash\nexec {real} "${{@/#-march=*/-march={processor}}}"\n')
    script.chmod(0o755)
    chosen = "(a_sublayer and dtype0 and paper) or matrix or faded or beyond or threads"
    command = [sys.executable, "-m", "pytest", "-q", "tests/kernels/test_contract.py", "-k"]
    answer = subprocess.run(
        [*command, f"cpu and ({chosen})"],
        env={**os.environ, "CXX": str(script), "XDG_CACHE_HOME": str(tmp_path / "cache")},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stdout[-3000:] + answer.stderr
    assert " passed" in answer.stdout
    assert "failed" not in answer.stdout
