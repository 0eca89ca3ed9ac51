"""The package as a user gets it: a wheel, installed and run away from the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "manifold_hc/py.typed" in names
    assert "manifold_hc/report/page.html.jinja" in names
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"manifold_hc"}
    metadata = next(name for name in names if name.endswith("METADATA"))
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    assert "License-Expression: Apache-2.0" in text
    assert "Requires-Dist: torch<2.15,>=2.13" in text
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_trains_and_reports_outside_the_checkout(installed, tmp_path, text_file):
    where = outside(installed, tmp_path, "-c", "import manifold_hc; print(manifold_hc.__file__)")
    assert where.stdout.startswith(str(installed)), where.stderr
    small = ["model.channels=16", "model.blocks=1", "data.sequence=16", "training.steps=2"]
    command = ["-m", "manifold_hc", "compare", "--data", str(text_file), "--out", "run", *small]
    answer = outside(installed, tmp_path, *command)
    assert answer.returncode == 0, answer.stderr
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000


def test_importing_loads_no_heavy_package(installed, tmp_path):
    """Plots, templates and configuration are for the commands; a model needs none of them."""
    code = (
        "import sys, manifold_hc\n"
        "heavy = {'matplotlib', 'jinja2', 'rich', 'click', 'transformers', 'triton'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    baseline = outside(installed, tmp_path, "-c", code.replace("manifold_hc", "torch"))
    ours = outside(installed, tmp_path, "-c", code)
    assert ours.returncode == 0, ours.stderr
    assert ours.stdout == baseline.stdout


def test_the_public_names():
    import manifold_hc as mhc

    for name in mhc.__all__:
        assert getattr(mhc, name) is not None
    assert {"Connection", "ConnectionConfig", "Stack", "diagnostics", "functional"} <= set(
        mhc.__all__
    )
