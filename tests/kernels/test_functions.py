"""C functions from Python: signatures, ranges of numbers, and memory that runs out."""

import ctypes
import subprocess
import sys

import pytest
import torch

from manifold_hc.errors import BackendError
from manifold_hc.kernels import unsupported_reason
from manifold_hc.kernels.cpu import functions
from manifold_hc.kernels.cpu.functions import FUNCTIONS, INT64, POINTER, STATUS, Kernel

pytestmark = pytest.mark.skipif(
    bool(unsupported_reason("cpu", 4, "cpu", [torch.float32])), reason="no CPU kernels here"
)


def test_declarations_are_those_of_the_library():
    assert FUNCTIONS["mhc_write"].signature == "pppppiiiiii->s"
    assert FUNCTIONS["mhc_slice_floats"].signature == "iii->i"
    functions.check(functions.loaded())


def with_declaration(monkeypatch, name, result, **arguments):
    monkeypatch.setattr(functions, "FUNCTIONS", dict(FUNCTIONS))
    Kernel(name, result, arguments)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "mhc_read",
            {"x": POINTER, "pre": POINTER, "tokens": INT64},
            "have pppiiiii->s as mhc_read but Python declares ppi->s; delete /",
        ),
        ("mhc_new", {"x": POINTER}, "have nothing as mhc_new but Python declares p->s; delete /"),
    ],
)
def test_a_wrong_declaration_is_an_error(monkeypatch, name, arguments, message):
    with_declaration(monkeypatch, name, STATUS, **arguments)
    with pytest.raises(BackendError, match=message):
        functions.check(functions.loaded())


def test_a_function_without_a_declaration_is_an_error(monkeypatch):
    declared = {name: each for name, each in FUNCTIONS.items() if name != "mhc_slices"}
    monkeypatch.setattr(functions, "FUNCTIONS", declared)
    with pytest.raises(BackendError, match="have i->i as mhc_slices but Python declares nothing"):
        functions.check(functions.loaded())


def test_a_library_without_signatures_is_an_error():
    with pytest.raises(BackendError, match="export no mhc_signatures; delete"):
        functions.check(ctypes.CDLL(None))


def test_a_forgotten_argument_is_an_error():
    with pytest.raises(TypeError, match=r"mhc_read: takes .*'pre'.* but was given"):
        FUNCTIONS["mhc_read"](x=None, u=None)


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
    for function in FUNCTIONS.values():
        if isinstance(function, Kernel):
            rows = (7, 9) if "boundary" in function.name else (0, 2**20 + 1, 2**32 + 8)
            for argument in function.arguments:
                for wrong in rows if argument == "rows" else WRONG.get(argument, ()):
                    yield function.name, argument, wrong


@pytest.mark.parametrize(("name", "argument", "wrong"), list(wrong_numbers()))
def test_c_refuses_numbers_out_of_range(name, argument, wrong):
    """Before it reads any memory: all pointers are null."""
    function = FUNCTIONS[name]
    given = {each: None if kind is POINTER else 0 for each, kind in function.arguments.items()} | {
        each: size for each, size in SIZES.items() if each in function.arguments
    }
    del given["threads"]
    with pytest.raises(BackendError, match=f"{name} was given a number out of its range"):
        function(**{**given, argument: wrong})


def test_numbers_beyond_64_bits_are_not_cut():
    sinkhorn = FUNCTIONS["mhc_sinkhorn"]
    numbers = {"tokens": 0, "n": 2, "iterations": 2**64 + 20, "transposed": False, "eps": 0.0}
    with pytest.raises(BackendError, match="numbers of 64 bits but one is 18446744073709551636"):
        sinkhorn(logits=None, res=None, **numbers)


# A team of two threads, whose memory for the iterates exceeds the limit.
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
    """Memory kept of earlier results, 16 MiB of another size, is released before the error."""
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
