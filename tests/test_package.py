"""The package as a user installs it: a wheel, run outside the checkout."""

import doctest
import inspect
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from manifold_hc import extras

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    subprocess.run(
        [*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)],
        check=True,
    )
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def outside(installed, folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_the_wheel_contains_only_the_package(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")  # the kernels are in what `make wheel` makes
    names = zipfile.ZipFile(wheel).namelist()
    assert "manifold_hc/py.typed" in names
    assert "manifold_hc/report/page.html.jinja" in names
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"manifold_hc"}
    metadata = next(name for name in names if name.endswith("METADATA"))
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    assert "License-Expression: Apache-2.0" in text
    core = re.findall("^Requires-Dist: ((?:(?!extra ==).)+)$", text, re.MULTILINE)
    assert sorted(Requirement(line).name for line in core) == [
        "filelock",
        "jaxtyping",
        "platformdirs",
        "torch",
    ]
    assert "torch>=2.10" in core  # and no upper bound
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_trains_and_reports_outside_the_checkout(installed, tmp_path, text_file):
    where = outside(installed, tmp_path, "-c", "import manifold_hc; print(manifold_hc.__file__)")
    assert where.stdout.startswith(str(installed)), where.stderr
    small = ["model.channels=16", "model.blocks=1", "data.sequence=16", "training.steps=2"]
    command = ["-m", "manifold_hc", "compare", "--data", str(text_file), "--out", "run", *small]
    answer = outside(installed, tmp_path, *command)
    assert answer.returncode == 0, answer.stderr
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000


def test_import_loads_no_heavy_package(installed, tmp_path):
    """Plots, templates and configuration are for the commands; a model needs none of them."""
    code = (
        "import sys, manifold_hc\n"
        f"heavy = {[*extras.TRAIN, 'transformers', 'triton', 'torch.distributed.tensor']}\n"
        "print(sorted(set(heavy) & set(sys.modules)))"
    )
    baseline = outside(installed, tmp_path, "-c", code.replace("manifold_hc", "torch"))
    ours = outside(installed, tmp_path, "-c", code)
    assert ours.returncode == 0, ours.stderr
    assert ours.stdout == baseline.stdout


def test_the_public_names():
    import manifold_hc as mhc

    for name in mhc.__all__:
        assert getattr(mhc, name) is not None
    assert set(mhc.__all__) == {
        "Connection",
        "ConnectionConfig",
        "Stack",
        "convert",
        "diagnostics",
        "functional",
        "load",
        "warmup",
    }


def test_dir_lists_the_public_names_only():
    import manifold_hc as mhc
    import manifold_hc.stack

    shown = {name for name in dir(mhc) if not name.startswith("__")}
    assert shown == set(mhc.__all__)
    assert {"__version__", "__doc__", "__all__"} <= set(dir(mhc))
    assert mhc.stack is sys.modules["manifold_hc.stack"], "submodules remain attributes"
    assert mhc.config.ConnectionConfig is mhc.ConnectionConfig
    assert not inspect.ismodule(mhc.warmup), "the function has the name of its module"


def test_the_example_of_the_package_runs():
    import manifold_hc as mhc

    result = doctest.testmod(mhc)
    assert (result.attempted, result.failed) == (5, 0)


def test_the_extra_lists_the_packages_that_pip_installs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installed = [Requirement(line).name for line in project["optional-dependencies"]["train"]]
    assert sorted(name.replace("-", "_") for name in installed) == sorted(extras.TRAIN)


@pytest.fixture(scope="module")
def core(installed, tmp_path_factory):
    """A function that runs Python with only the core's dependencies installed."""
    site = tmp_path_factory.mktemp("core")
    for entry in {*top_level_entries(), *installed.iterdir()}:
        (site / entry.name).symlink_to(entry)
    home = tmp_path_factory.mktemp("home")

    def run(*arguments, **environment):
        return subprocess.run(
            [sys.executable, "-S", "-W", "ignore:Failed to initialize NumPy", *arguments],
            env={"PYTHONPATH": str(site), "HOME": str(home), **environment},
            cwd=home,
            capture_output=True,
            text=True,
        )

    run.home = home
    return run


def top_level_entries():
    """Entries in site-packages of the core's dependencies and of their dependencies."""
    waiting, seen = ["torch", "jaxtyping", "filelock", "platformdirs"], set()
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in seen:
            continue
        seen.add(name)
        found = metadata.distribution(name)
        for line in found.requires or []:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                waiting.append(needed.name)
        for file in found.files:
            if file.parts[0] not in ("..", "__pycache__"):
                yield Path(found.locate_file(file.parts[0]))


def test_the_core_trains_without_the_extra(core):
    """Forward and backward on the reference backend, the gain monitor, and warmup."""
    code = (
        "import torch, manifold_hc as mhc\n"
        "config = mhc.ConnectionConfig(backend='reference')\n"
        "stack = mhc.Stack(8, config, sublayers=2)\n"
        "h = stack(torch.randn(3, 8, requires_grad=True), [torch.tanh] * 2)\n"
        "h.sum().backward()\n"
        "class Model(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.stack = stack\n"
        "    def forward(self, h):\n"
        "        return self.stack(h, [torch.tanh] * 2)\n"
        "print(mhc.diagnostics.GainMonitor(torch.randn(3, 8))(Model())['gain_forward'])\n"
        "mhc.warmup(8, config, tokens=4)\n"
    )
    answer = core("-c", code)
    assert answer.returncode == 0, answer.stderr
    assert float(answer.stdout) == pytest.approx(1)
    assert answer.stderr == ""


def test_the_core_imports_without_compiler_or_cache(core):
    answer = core("-c", "import manifold_hc", PATH="")
    assert answer.returncode == 0, answer.stderr
    assert list(core.home.iterdir()) == []


@pytest.mark.parametrize("arguments", [[], ["train"], ["--help"]])
def test_a_command_without_the_extra_names_it_in_one_line(core, arguments):
    answer = core("-m", "manifold_hc", *arguments)
    assert answer.returncode == 2
    assert answer.stdout == ""
    (line,) = answer.stderr.splitlines()
    assert line.startswith("mhc: error: the command mhc needs click, ")
    assert line.endswith("; install with: pip install 'manifold-hc[train]'")


@pytest.mark.parametrize("module", ["training", "data", "report", "study"])
def test_a_module_without_the_extra_names_it(core, module):
    answer = core("-c", f"import manifold_hc.{module}")
    assert answer.returncode == 1
    assert answer.stderr.splitlines()[-1].startswith(
        "manifold_hc.errors.MissingExtraError: manifold_hc."
    )
    assert answer.stderr.endswith("install with: pip install 'manifold-hc[train]'\n")
