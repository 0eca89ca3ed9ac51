import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import manifold_hc as mhc
from manifold_hc.errors import BackendError, ConfigError, DtypeError
from manifold_hc.kernels import unsupported_reason
from manifold_hc.warmup import MARGIN, Advice, _advice_of

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


@pytest.mark.slow
def test_the_first_step_compiles_nothing_after_warmup(tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", FIRST_STEP]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    before, after = answer.stderr.split("warm\n")
    assert "building the CPU kernels" in before
    assert "kernels are warm after" in before
    assert after == ""


@pytest.mark.parametrize("kind", ["residual", "hc", "mhc"])
@pytest.mark.parametrize("numerics", ["paper", "deepseek_v4"])
def test_warmup_leaves_random_state_and_grad_mode(kind, numerics):
    config = mhc.ConnectionConfig(kind=kind, numerics=numerics, phi_std=0.1)
    before = torch.get_rng_state()
    with torch.no_grad():
        mhc.warmup(8, config, dtype=torch.float32, branch_dtype=torch.bfloat16)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)


def test_warmup_raises_for_an_unsupported_backend():
    config = mhc.ConnectionConfig(backend="cpu")
    with pytest.raises(BackendError, match="takes streams in float32 or bfloat16"):
        mhc.warmup(8, config, dtype=torch.float16)


def test_unknown_devices_and_integer_dtypes_raise():
    with pytest.raises(ConfigError, match="warmup: torch finds no device nowhere"):
        mhc.warmup(8, device="nowhere")
    with pytest.raises(DtypeError, match=r"warmup: dtype must be a real floating-point"):
        mhc.warmup(8, dtype=torch.int32)
    with pytest.raises(DtypeError, match=r"branch_dtype must be a real .* but is torch.int8"):
        mhc.warmup(8, branch_dtype=torch.int8)


class Calls(TorchDispatchMode):
    """Counts the operators of this package."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func.__name__.partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def boundaries_of(config, channels, dtype):
    """Number of fused boundaries out of three in a new stack; its result and gradients."""
    torch.manual_seed(0)
    stack = mhc.Stack(channels, config, 4)
    h = torch.randn(5, channels).to(dtype).requires_grad_()
    with Calls() as calls:
        out = stack(h, [torch.sin] * 4)
    out.float().square().sum().backward()
    fused = sum(count for name, count in calls.names.items() if name.endswith("boundary"))
    return fused, [out, h.grad, *(p.grad for p in stack.parameters() if p.grad is not None)]


@pytest.mark.parametrize("single_pass", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_forms_of_a_boundary_agree(dtype, single_pass):
    config = mhc.ConnectionConfig(phi_std=0.3, alpha=0.5, single_pass=single_pass)
    if unsupported_reason("cpu", 4, "cpu", [dtype, torch.float32]):
        pytest.skip("needs the CPU kernels")
    fused, expected = boundaries_of(config, 24, dtype)
    separate, found = boundaries_of(replace(config, fuse_boundaries=False), 24, dtype)
    assert (fused, separate) == (3, 0)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for a, b in zip(expected, found, strict=True):
        assert (a - b).norm() <= tolerance * a.norm()


@pytest.mark.parametrize("single_pass", [False, True])
def test_the_advice_is_the_faster_form(caplog, single_pass):
    if unsupported_reason("cpu", 4, "cpu", [torch.float32]):
        pytest.skip("needs the CPU kernels")
    config = mhc.ConnectionConfig(single_pass=single_pass)
    with caplog.at_level("INFO", "manifold_hc"):
        advice = mhc.warmup(40, config, tokens=7)
    (line,) = [record.message for record in caplog.records if "boundary" in record.message]
    pattern = (
        r"boundary of 7 tokens of 4 x 40 float32 on cpu: "
        r"fused (\S+) ms, separate (\S+) ms; fuse_boundaries=(True|False) is faster"
    )
    fused, separate, choice = re.fullmatch(pattern, line).groups()
    assert min(advice.fused_seconds, advice.separate_seconds) > 0
    assert fused == f"{1e3 * advice.fused_seconds:.3g}"
    assert separate == f"{1e3 * advice.separate_seconds:.3g}"
    assert choice == str(advice.fuse_boundaries)
    slower = advice.fused_seconds > MARGIN * advice.separate_seconds
    assert advice.fuse_boundaries == (not slower)


@pytest.mark.parametrize("fuse_boundaries", [False, True])
def test_the_configuration_holds_the_choice(fuse_boundaries):
    """Timing both forms leaves the stacks that are built later as their configuration says."""
    if unsupported_reason("cpu", 4, "cpu", [torch.float32]):
        pytest.skip("needs the CPU kernels")
    config = mhc.ConnectionConfig(fuse_boundaries=fuse_boundaries)
    mhc.warmup(40, config, tokens=7)
    fused, _ = boundaries_of(config, 40, torch.float32)
    assert fused == (3 if fuse_boundaries else 0)


@pytest.mark.parametrize("fuse_boundaries", [False, True])
@pytest.mark.parametrize(
    "fields", [{"kind": "hc"}, {"constraint": "permutation"}, {"backend": "reference"}]
)
def test_one_form_alone_is_not_timed(fields, fuse_boundaries, caplog):
    config = mhc.ConnectionConfig(fuse_boundaries=fuse_boundaries, **fields)
    with caplog.at_level("INFO", "manifold_hc"):
        assert mhc.warmup(8, config, tokens=3) == Advice(fuse_boundaries, None, None)
    assert not any("boundary" in record.message for record in caplog.records)


@pytest.mark.parametrize(
    ("fused", "separate", "fuse"),
    [(1.0, 2.0, True), (MARGIN, 1.0, True), (1.01 * MARGIN, 1.0, False), (2.0, 1.0, False)],
)
def test_the_separate_form_is_advised_only_if_it_is_clearly_faster(fused, separate, fuse):
    assert _advice_of(fused, separate) == Advice(fuse, fused, separate)


@pytest.mark.parametrize("tokens", [0, -1, 2.5, "10", True])
def test_tokens_must_be_a_positive_integer(tokens, unchecked):
    with pytest.raises(ConfigError, match="warmup: tokens must be"):
        mhc.warmup(8, tokens=tokens)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_warmup_compiles_backward_without_grad_mode(mode):
    with mode():
        mhc.warmup(8, mhc.ConnectionConfig(), tokens=3)
