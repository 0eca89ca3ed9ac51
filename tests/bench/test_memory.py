"""Allocations of functions whose allocations are known."""

import pytest
import torch

from manifold_hc.bench.measure import memory
from manifold_hc.bench.peers.implementations import (
    Implementation,
    ours,
    supported_backends,
    without_branch,
)
from manifold_hc.bench.problem import Problem

SMALL = Problem(tokens=64, channels=32)
STREAMS = SMALL.stream_bytes
ONE = STREAMS // SMALL.streams


def implementation(step, **flags):
    return Implementation(step, (), lambda *tensors: tensors, **flags)


def on_cpu(run):
    return memory.peak_bytes(run, torch.device("cpu"))


def test_a_peak_is_not_a_sum():
    def run():
        first = torch.empty(1000)
        del first
        second = torch.empty(3000)
        third = torch.empty(500)
        del second
        return third, torch.empty(1000)

    assert on_cpu(run) == 4 * 3500


def test_nothing_allocated():
    x = torch.ones(1000)
    assert on_cpu(lambda: x.mul_(2.0)) <= 64  # the scalar


class Copies(torch.autograd.Function):
    """x' = x + y, u = x[0]; forward keeps two copies of the streams, backward makes a third."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x.clone(), x.clone())
        return x[..., 0, :].clone(), x.clone()

    @staticmethod
    def backward(ctx, grad_u, grad_new):
        scratch = torch.empty_like(grad_new)
        del scratch
        return grad_new.clone(), grad_u.clone()


def test_extra_memory_excludes_inputs_outputs_and_their_gradients():
    inputs = SMALL.inputs()
    found = memory.cost(implementation(Copies.apply), inputs)
    # Two kept copies; the scratch is gone before the gradients are made.
    assert found.extra_bytes == 2 * STREAMS
    assert (found.forward_launches, found.backward_launches) == (4, 2)


def test_the_reference_keeps_more_than_the_fast_backends_may():
    found = memory.cost(ours(SMALL, SMALL.inputs(), "reference"), SMALL.inputs())
    assert found.extra_bytes > 2 * STREAMS
    assert found.forward_launches > 50


@pytest.mark.skipif("cpu" not in supported_backends(SMALL)[0], reason="no CPU kernels here")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cpu_kernels_need_less_than_half_of_the_streams(dtype):
    """The figure of docs/backends.md; memory that the kernels reuse counts too."""
    problem = Problem(tokens=2048, channels=1280, dtype=dtype)
    inputs = problem.inputs()
    found = memory.cost(ours(problem, inputs, "cpu"), inputs)
    assert 0.1 * problem.stream_bytes < found.extra_bytes < 0.5 * problem.stream_bytes


def test_compiled_code_hides_its_operators():
    inputs = SMALL.inputs()
    plain = without_branch(lambda x, branch: x + branch(x.mean(-2)).unsqueeze(-2))
    assert memory.cost(implementation(plain, compiled=True), inputs)[1:] == (None, None)


def test_views_are_no_launches():
    x = torch.ones(4, 4)
    assert memory.operators_run(lambda: x.t().unsqueeze(0)[0].view(4, 4)) == 0
    assert memory.operators_run(lambda: (x + x).t() @ x) == 2
