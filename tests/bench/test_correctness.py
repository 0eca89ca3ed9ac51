"""Every implementation against float64; wrong outputs and gradients are found."""

import math
from dataclasses import replace

import pytest
import torch

from manifold_hc.bench import correctness, peers
from manifold_hc.bench.peers.implementations import ours, supported_backends
from manifold_hc.bench.problem import Problem
from manifold_hc.bench.task import quiet

SMALL = Problem(tokens=64, channels=32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("numerics", ["paper", "deepseek_v4"])
def test_our_backends_are_correct(dtype, numerics):
    problem = replace(SMALL, dtype=dtype, numerics=numerics)
    inputs = problem.inputs()
    backends, _ = supported_backends(problem)
    assert "reference" in backends
    for backend in backends:
        assert correctness.check(ours(problem, inputs, backend), inputs).ok, backend


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("streams", [2, 4])
@pytest.mark.parametrize("peer", peers.for_problem(SMALL), ids=lambda peer: peer.package)
def test_peers_are_correct(peer, streams, dtype):
    problem = replace(SMALL, streams=streams, dtype=dtype)
    inputs = problem.inputs()
    implementation = peer.build(problem, inputs)
    with quiet():
        found = correctness.check(implementation, inputs)
    assert found.ok, found


def test_a_transposed_res_is_wrong():
    inputs = SMALL.inputs()
    right = ours(SMALL, inputs, "reference")

    def step(x, y):
        u, _ = right.step(x, y)
        return u, right.step(x.flip(-2), y)[1].flip(-2)

    found = correctness.check(replace(right, step=step), inputs)
    assert not found.ok
    assert found.error > 0.01


def test_a_wrong_gradient_is_found():
    inputs = SMALL.inputs()
    right = ours(SMALL, inputs, "reference")

    def step(x, y):
        u, new = right.step(x, y)
        return u.detach() + (u - u.detach()) * 1.001, new

    assert correctness.check(replace(right, step=step), inputs).error > 1e-5
    assert not correctness.check(replace(right, step=step), inputs).ok


def test_errors_are_relative_to_the_largest_entry():
    wanted = torch.tensor([4.0, -8.0], dtype=torch.float64)
    assert correctness.relative_error(torch.tensor([4.0, -7.0]), wanted) == 0.125
    assert correctness.relative_error(torch.tensor([4.0, math.nan]), wanted) == math.inf
    assert correctness.relative_error(torch.tensor([4.0]), wanted) == math.inf
    assert correctness.relative_error(torch.zeros(2), torch.zeros(2).double()) == 0
