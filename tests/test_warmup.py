import os
import subprocess
import sys

import pytest
import torch

import manifold_hc as mhc
from manifold_hc.errors import BackendError, ConfigError, DtypeError

FIRST_STEP = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s")
import torch
import manifold_hc as mhc

config = mhc.ConnectionConfig(streams=3)
mhc.warmup(8, config, dtype=torch.float32)
print("warm", file=sys.stderr)
mhc.Stack(8, config, 2)(torch.ones(5, 8, requires_grad=True), [torch.sin] * 2).sum().backward()
"""


def test_nothing_is_left_to_compile_for_the_first_step(tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", FIRST_STEP]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    before, after = answer.stderr.split("warm\n")
    assert "building the CPU kernels" in before
    assert "kernels are warm after" in before
    assert after == ""


@pytest.mark.parametrize("kind", ["residual", "hc", "mhc"])
@pytest.mark.parametrize("numerics", ["paper", "deepseek_v4"])
def test_it_changes_nothing_but_caches(kind, numerics):
    config = mhc.ConnectionConfig(kind=kind, numerics=numerics, phi_std=0.1)
    before = torch.get_rng_state()
    with torch.no_grad():
        mhc.warmup(8, config, dtype=torch.float32, branch_dtype=torch.bfloat16)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_backend_that_cannot_serve_says_so_now():
    config = mhc.ConnectionConfig(backend="cpu")
    with pytest.raises(BackendError, match="takes streams in float32 or bfloat16"):
        mhc.warmup(8, config, dtype=torch.float16)


def test_what_is_not_there_is_named():
    with pytest.raises(ConfigError, match="warmup: torch finds no device nowhere"):
        mhc.warmup(8, device="nowhere")
    with pytest.raises(DtypeError, match=r"warmup: dtype must be a real floating-point"):
        mhc.warmup(8, dtype=torch.int32)
    with pytest.raises(DtypeError, match=r"branch_dtype must be a real .* but is torch.int8"):
        mhc.warmup(8, branch_dtype=torch.int8)
