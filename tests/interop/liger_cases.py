"""Layouts against Liger-Kernel's own module, interpreted: run by test_layouts.py in its process."""

from dataclasses import replace

import pytest
import torch
from liger_kernel.transformers import LigerMHC
from torch import nn

import manifold_hc as mhc
from manifold_hc.interop.layouts import LAYOUTS
from tests.interop.layout_models import filled

LIGER = LAYOUTS["liger"]
C, SUBLAYERS = 8, 2


def modules(n: int) -> nn.ModuleList:
    """One module of Liger-Kernel for each sublayer, around a linear layer, with random values."""
    made = nn.ModuleList(
        LigerMHC(
            nn.Linear(C, C, bias=False),
            hc=n,
            c=C,
            pre_eps=1e-6,
            phi_dtype=torch.float32,
            allow_fp32=True,
        )
        for _ in range(SUBLAYERS)
    )
    return filled(made)


def streams(theirs: nn.ModuleList, stack: mhc.Stack, x):
    """Random streams after all sublayers, by their modules and by our connections."""
    expected = actual = x
    for module, connection in zip(theirs, stack.connections, strict=True):
        expected = module(expected)
        actual = connection(actual, module.layer)
    return expected, actual


@pytest.mark.parametrize("n", [2, 4])
def test_its_modules_become_a_stack_with_the_same_output(n):
    theirs = modules(n)
    native = LIGER.to_native(theirs.state_dict())
    stack = mhc.Stack(C, LIGER.config(n), SUBLAYERS)
    stack.load_state_dict(native)
    x = torch.randn(1, 3, n, C)
    expected, actual = streams(theirs, stack, x)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    with_rows_last = mhc.Stack(C, replace(LIGER.config(n), constraint="sinkhorn"), SUBLAYERS)
    with_rows_last.load_state_dict(native)
    assert (streams(theirs, with_rows_last, x)[1] - expected).abs().max() > 1e-3


@pytest.mark.parametrize("n", [2, 4])
def test_a_stack_becomes_its_modules_with_the_same_output(n):
    theirs, stack = modules(n), filled(mhc.Stack(C, LIGER.config(n), SUBLAYERS))
    tensors = LIGER.from_native(stack.state_dict())
    layers = {k: v for k, v in theirs.state_dict().items() if ".layer." in k}
    theirs.load_state_dict(tensors | layers)
    expected, actual = streams(theirs, stack, torch.randn(1, 3, n, C))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
