"""A parameter is trainable if and only if it gets a gradient."""

from itertools import chain, combinations, product

import pytest
import torch

import manifold_hc as mhc
from manifold_hc.constraints import CONSTRAINTS

C, L = 6, 2
PARTS = ("pre", "post", "res")
DISABLED = list(chain.from_iterable(combinations(PARTS, count) for count in range(4)))
KINDS = [
    {"kind": "hc"},
    *(
        {"kind": "mhc", "constraint": name, "single_pass": single_pass}
        for name in CONSTRAINTS
        for single_pass in (False, True)
    ),
    {"kind": "mhc", "numerics": "deepseek_v4"},
]


def label(options):
    return " ".join(str(value) for value in options.values())


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("options", KINDS, ids=label)
def test_exactly_the_trainable_parameters_get_a_gradient(options, dynamic):
    for n, disable in product((1, 2), DISABLED):
        config = mhc.ConnectionConfig(
            streams=n, dynamic=dynamic, disable=disable, iterations=1, **options
        )
        recompute = L if options["kind"] == "hc" else None
        stack = mhc.Stack(C, config, L, recompute)
        trainable = {name: p.requires_grad for name, p in stack.named_parameters()}
        stack.requires_grad_(True)
        h = torch.randn(1, C, requires_grad=True)
        stack(h, [torch.tanh] * L).square().sum().backward()
        reached = {name: p.grad is not None for name, p in stack.named_parameters()}
        assert trainable == reached, (n, disable)
