"""The Triton backend against the float64 reference, without a GPU and, where one is, on it."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed"
    ),
]

CASES = Path(__file__).with_name("triton_cases.py")


def run(*arguments: str | Path, interpreted: bool) -> None:
    """In a process of its own: triton decides at its first import whether it interprets."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        env=dict(os.environ, TRITON_INTERPRET=str(int(interpreted))),
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout


# The fewest cases that have every value of every parameter, and with --wide all.
cases = pytest.mark.parametrize(
    "chosen",
    [
        pytest.param(["--quick"], id="some"),
        pytest.param([], id="all", marks=pytest.mark.wide),
    ],
)


@cases
def test_every_kernel_interpreted(chosen):
    run(CASES, *chosen, interpreted=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_every_kernel_on_this_gpu():
    run(CASES, interpreted=False)


OPERATORS = (
    "every_number or broadcasts or another or unused_outputs or second or nan_in or one_at"
    " or not_learn or several_dtypes or independent"
)
FILES = ("contract", "separate_calls", "extremes", "arguments")
EXTREMES = (
    "(separate and 320 and not deepseek) or huge or infinite or one_hot or cancels"
    " or transpose_without or extreme_inputs or freed or wrong_arguments or no_channels"
)


@cases
def test_the_contract_interpreted(chosen):
    """The operators around the kernels; the cases above cover those that are slow interpreted."""
    contract(OPERATORS, *chosen)


@pytest.mark.wide
def test_extremes_interpreted():
    contract(EXTREMES)


def contract(names: str, *arguments: str) -> None:
    files = [f"tests/kernels/test_{name}.py" for name in FILES] + ["tests/test_single_pass.py"]
    run(*files, "-k", f"triton and ({names})", *arguments, interpreted=True)
