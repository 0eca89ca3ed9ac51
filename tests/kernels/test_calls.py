"""The C functions from Python: types, the range of numbers, and memory that is not there."""

import ctypes
import re
import subprocess
import sys

import pytest
import torch

from manifold_hc.errors import BackendError
from manifold_hc.kernels import refusal
from manifold_hc.kernels.cpu import build, calls

pytestmark = pytest.mark.skipif(
    bool(refusal("cpu", 4, "cpu", [torch.float32])), reason="no CPU kernels here"
)


KINDS = {"int64_t": "i", "float": "f"}


def declared_in_c():
    """Result, kinds and names of arguments of every function that the sources export."""
    found = {}
    for file in build.SOURCES.glob("*.cpp"):
        for result, name, inside in re.findall(
            r"^(\w+) (mhc_\w+)\(([^)]*)\)", file.read_text(), re.MULTILINE
        ):
            given = [argument.split() for argument in inside.split(",")]
            kinds = "".join(
                "p" if "*" in " ".join(argument) else KINDS[argument[0]] for argument in given
            )
            found[name] = (result, kinds, [argument[-1] for argument in given])
    return found


def test_the_table_is_what_the_sources_declare():
    table = {name: ("int", kinds.replace(" ", "") + "i") for name, kinds in calls.FUNCTIONS.items()}
    table |= {name: ("int64_t", kinds) for name, kinds in calls.SIZES.items()}
    assert {name: declared[:2] for name, declared in declared_in_c().items()} == table


SIZES = {"tokens": 3, "n": 2, "C": 4, "size": 8, "rows": 8, "iterations": 2, "writes": 1}

WRONG = {
    "tokens": (-1, 2**62),
    "n": (-1, 0, 17, 2**32 + 2),
    "C": (0, 2**62),
    "size": (0, 2**62),
    "iterations": (0, 2**20 + 1, 2**31, 2**32 + 2),
    "constraint": (-1, 3, 2**32),
    "writes": (-1, 2**31),
}


def wrong_numbers():
    for function, (_, _, names) in declared_in_c().items():
        if function in calls.FUNCTIONS:
            rows = (7, 9) if "boundary" in function else (0, 2**20 + 1, 2**32 + 8)
            for name in names:
                for wrong in rows if name == "rows" else WRONG.get(name, ()):
                    yield function, name, wrong


@pytest.mark.parametrize(("function", "name", "wrong"), list(wrong_numbers()))
def test_c_refuses_numbers_out_of_range(function, name, wrong):
    """Before it looks at any memory: there is none here."""
    _, kinds, names = declared_in_c()[function]
    sizes, defaults = {**SIZES, name: wrong}, {"p": None, "f": 0.0, "i": 0}
    given = [sizes.get(each, defaults[k]) for each, k in zip(names, kinds, strict=True)]
    with pytest.raises(BackendError, match=f"{function} was given a number out of its range"):
        calls.call(function, *given[:-1])  # threads are added


def test_numbers_beyond_64_bits_are_not_cut():
    with pytest.raises(BackendError, match="numbers of 64 bits but one is 18446744073709551636"):
        calls.call("mhc_sinkhorn", None, None, 0, 2, 2**64 + 20, False, 0.0)


def test_a_library_of_another_version_is_refused():
    with pytest.raises(BackendError, match="have no mhc_"):
        calls._declared(ctypes.CDLL(None))


# A team of two threads, whose room for the iterates does not fit into what is left.
HUNGRY = """
import resource
import torch
from manifold_hc import functional
from manifold_hc.errors import OutOfMemoryError

torch.set_num_threads(2)
def gradient(iterations):
    if use == "sinkhorn":
        out = functional.sinkhorn(logits, iterations, backend="cpu")
    else:
        maps = functional.coefficients(x, phi, alpha, bias, iterations=iterations, backend="cpu")
        out = maps[2]
    return torch.autograd.grad(out.square().sum(), logits if use == "sinkhorn" else x)[0]

use = "{use}"
n = 16
logits = torch.randn(64, n, n, requires_grad=True)
x, phi = torch.randn(64, n, 8, requires_grad=True), torch.randn(2 * n + n * n, n * 8)
alpha, bias = torch.ones(3), torch.zeros(2 * n + n * n)
before = gradient(5)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (12 << 20), resource.RLIM_INFINITY))
try:
    gradient(1000)
except OutOfMemoryError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert torch.equal(gradient(5), before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
@pytest.mark.parametrize("use", ["sinkhorn", "coefficients"])
def test_out_of_memory_is_an_error_not_the_end(use):
    code = HUNGRY.replace("{use}", use)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "_backward: the CPU kernels found no memory for their own use" in done.stdout


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
@pytest.mark.parametrize(
    ("wanted", "printed"), [(64, "found no memory for a result of 18 MiB"), (48, "[65536, 48]")]
)
def test_a_result_without_memory_is_named(wanted, printed):
    """What earlier results have left is given back before that: 16 MiB, here of another size."""
    code = """
import resource, torch
from manifold_hc import functional
from manifold_hc.errors import OutOfMemoryError
x, pre = torch.zeros(1 << 16, 1, {wanted}), torch.ones(1 << 16, 1)
if {wanted} == 48:
    functional.read(torch.zeros(1 << 16, 1, 64), pre, backend="cpu")
functional.read(x[:8], pre[:8], backend="cpu")
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 20), resource.RLIM_INFINITY))
try:
    print(list(functional.read(x, pre, backend="cpu").shape))
except OutOfMemoryError as error:
    print(error)
"""
    code = code.replace("{wanted}", str(wanted))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert printed in done.stdout
