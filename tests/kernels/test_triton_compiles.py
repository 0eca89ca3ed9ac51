"""Every kernel compiled ahead of time for GPUs that need not be here: nothing may spill."""

import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)

COMPILER = Path(__file__).with_name("triton_compiler.py")
WORKERS = 2
ARCHITECTURES = (80, 90, 100, "gfx942")
# Largest shared memory of one program, in bytes.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, "gfx942": 64 * 1024}
STREAMS = ("bfloat16", "float32", "float16")


def job(arch, n, dtype, C=2560, constraint="sinkhorn", transposed=False, tiles=None, only=None):
    return {
        "arch": arch,
        "n": n,
        "C": C,
        "dtype": dtype,
        "constraint": constraint,
        "transposed": transposed,
        "tiles": tiles,
        "only": only,
    }


def some_jobs():
    """One target for each maker of GPUs, to save time."""
    yield job(90, 4, "bfloat16")
    yield job("gfx942", 3, "float16", transposed=True)


def all_jobs():
    """Every n on every architecture; dtypes, presets and widths take turns."""
    for k, arch in enumerate(ARCHITECTURES):
        for n in range(1, 9):
            yield job(arch, n, STREAMS[(n + k) % 3], transposed=(n + k) % 2 == 0)
        yield job(arch, 4, STREAMS[k % 3], C=256, transposed=k % 2 == 0)  # one launch
    yield job(90, 4, "bfloat16")
    yield job(90, 4, "float32", transposed=True)
    yield job(90, 8, "float32")
    yield job(90, 4, "bfloat16", C=1280, constraint="identity")
    for arch in ARCHITECTURES:
        yield job(arch, 4, "bfloat16", C=999, constraint="none")


def compiled(work, cache):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    environment["PYTHONPATH"] = str(COMPILER.parents[2])

    def run(worker):
        done = subprocess.run(
            [sys.executable, str(COMPILER), str(worker), str(WORKERS)],
            input=json.dumps(work),
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    with ThreadPoolExecutor(WORKERS) as pool:
        return [kernel for found in pool.map(run, range(WORKERS)) for kernel in found]


def spilled_by_the_compiler():
    """Bytes that the kernels' tiles do not account for: they were chosen with Triton 3.7."""
    return 0 if metadata.version("triton").startswith("3.7.") else 32


def table(kernels):
    rows = [
        f"{k['kernel']:30} {k['shape']:32} {k['arch']!s:7} {k['registers']:4} registers "
        f"{k['spilled']:5} B spilled {k['shared']:7} B shared {k['warps']:2} warps"
        for k in kernels
    ]
    return "\n".join(rows)


@pytest.mark.slow
def test_nothing_spills(request, tmp_path):
    """With --every-kernel at every n from 1 to 8: some minutes."""
    every = request.config.getoption("--every-kernel")
    jobs = list(all_jobs() if every else some_jobs())
    kernels = compiled(jobs, tmp_path)
    assert {k["arch"] for k in kernels} == {work["arch"] for work in jobs}
    names = {k["kernel"] for k in kernels}
    assert len(names) >= 16, names
    spilled = [k for k in kernels if k["spilled"] > spilled_by_the_compiler()]
    assert not spilled, "spilled:\n" + table(spilled) + "\nall:\n" + table(kernels)
    large = [k for k in kernels if k["shared"] > SHARED[k["arch"]]]
    assert not large, "too much shared memory:\n" + table(large)


@pytest.mark.slow
def test_a_spill_is_seen(tmp_path):
    """Absurd tiles, so that the test above can fail."""
    tiles = {"product_tile": {"BT": 16, "num_warps": 1}}
    only = "projections_gradient_kernel"
    work = [job(90, 4, "float32", C=256, constraint="identity", tiles=tiles, only=only)]
    assert any(k["spilled"] for k in compiled(work, tmp_path))
