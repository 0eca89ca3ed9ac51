"""Inputs at the edges: zero, huge, cancelling, and sizes that divide by nothing."""

import math

import pytest
import torch

from manifold_hc import functional
from tests.kernels.test_contract import (
    COMPILED,
    as_tuple,
    compare,
    device_of,
    maps,
    require_support,
    sublayer,
)

ALL = [*COMPILED, "reference"]

# NumPy, under Triton's interpreter, speaks up where float32 overflows on purpose.
pytestmark = pytest.mark.filterwarnings(
    "ignore:overflow encountered:RuntimeWarning",
    "ignore:invalid value encountered:RuntimeWarning",
    "ignore:divide by zero encountered:RuntimeWarning",
    "ignore:All-NaN:RuntimeWarning",
)


@pytest.fixture(params=COMPILED)
def backend(request):
    return request.param


def relative(got, wanted):
    """The worst token's error."""
    got, wanted = got.detach().cpu().double(), wanted.detach()
    rows = (got - wanted).reshape(len(got), -1).norm(dim=1)
    return float((rows / wanted.reshape(len(got), -1).norm(dim=1)).max())


@pytest.mark.parametrize("size", [1e15, 1e18, 1e20, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_streams_keep_their_maps_and_gradients(backend, size, dtype):
    """Beyond 1e17 the sum of their squares is more than float32 holds; some tokens are ordinary."""
    n, C = 4, 24
    require_support(backend, n, dtype)
    x = torch.randn(20, n, C)
    x[3:] *= size
    inputs = [x.to(dtype), *maps(n, C, n * n)]

    def run(tensors, backend, device):
        leaves = [tensor.to(device).requires_grad_() for tensor in tensors]
        outputs = functional.coefficients(*leaves, backend=backend)
        draw = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(out.shape, generator=draw).to(out) for out in outputs]
        return outputs, torch.autograd.grad(outputs, leaves, cotangents)

    got, ours = run(inputs, backend, "cpu" if backend == "reference" else device_of(backend))
    wanted, exact = run([tensor.double() for tensor in inputs], "reference", "cpu")
    for name, a, b in zip(("pre", "post", "res"), got, wanted, strict=True):
        assert relative(a, b) < 2e-6, name
    for name, a, b in zip(("x", "phi"), ours, exact, strict=False):
        rounding = 2**-7 if name == "x" and dtype == torch.bfloat16 else 1e-5
        assert relative(a, b) < rounding, name
    assert ours[1].abs().max() > 1e-3


def test_huge_streams_are_never_static_in_the_reference():
    """It is the plain formula: NaN says so where float32 does not hold the squares."""
    n, C = 4, 24
    x = torch.randn(20, n, C)
    x[3:] *= 1e20
    phi, alpha, bias = maps(n, C, n * n)
    pre, post, _ = functional.coefficients(x, phi, alpha, bias, backend="reference")
    for got in (pre, post):
        assert got.isnan().any(1).tolist() == [token >= 3 for token in range(20)]


def test_huge_streams_of_the_other_maps(backend):
    """HC's, and the learned exit's."""
    require_support(backend, 3, torch.float32)
    n, C = 3, 8
    x = 1e20 * torch.randn(6, n, C)
    phi, alpha, bias = maps(n, C, n * n)
    where = "cpu" if backend == "reference" else device_of(backend)
    calls = {
        functional.hc_coefficients: (x, torch.randn(2 + n, C) / C**0.5, alpha, bias),
        functional.exit_coefficients: (x, phi[:n], alpha[:1], bias[:n]),
    }
    for function, given in calls.items():
        got = function(*(tensor.to(where) for tensor in given), backend=backend)
        wanted = function(*(tensor.double() for tensor in given), backend="reference")
        for a, b in zip(as_tuple(got), as_tuple(wanted), strict=True):
            assert relative(a, b) < 2e-6


@pytest.mark.parametrize("backend", ALL)
def test_infinite_streams_are_not_taken_for_huge_ones(backend):
    require_support(backend, 2, torch.float32)
    x = torch.randn(5, 2, 8)
    x[2, 1, 3] = math.inf
    where = "cpu" if backend == "reference" else device_of(backend)
    given = [tensor.to(where) for tensor in (x, *maps(2, 8, 4))]
    pre = functional.coefficients(*given, backend=backend)[0].cpu()
    assert pre.isnan().any(1).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ALL)
def test_a_one_hot_read_is_the_stream(backend, dtype):
    n, C = 4, 37
    require_support(backend, n, dtype)
    x = torch.randn(n, n, C).to(dtype).to("cpu" if backend == "reference" else device_of(backend))
    u = functional.read(x, torch.eye(n).to(x.device), backend)
    assert torch.equal(u, x[torch.arange(n), torch.arange(n)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ALL)
def test_a_read_that_cancels_is_zero(backend, dtype):
    C = 37
    require_support(backend, 2, dtype)
    stream = (
        torch.randn(9, 1, C).to(dtype).to("cpu" if backend == "reference" else device_of(backend))
    )
    weights = torch.tensor([0.5, -0.5]).to(stream.device)
    assert not functional.read(stream.expand(9, 2, C), weights, backend).any()
    assert not functional.read(torch.cat([stream, -stream], 1), weights.abs(), backend).any()


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("n", [1, 2, 4, 5])
def test_the_presets_differ_by_a_transpose_without_epsilon(backend, n):
    require_support(backend, n, torch.float32)
    where = "cpu" if backend == "reference" else device_of(backend)
    logits = (2 * torch.randn(12, n, n)).to(where).requires_grad_()
    paper = functional.sinkhorn(logits, 7, "paper", backend)
    v4 = functional.sinkhorn(logits.mT, 7, "deepseek_v4", backend, hc_eps=0.0)
    cotangent = torch.randn(12, n, n).to(where)
    ours, theirs = (torch.autograd.grad(out, logits, cotangent)[0] for out in (paper, v4))
    torch.testing.assert_close(v4, paper, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("C", [5129, 5137, 16392])
def test_widths_beside_powers_of_two(backend, C, dtype):
    require_support(backend, 4, dtype)
    if backend == "triton" and device_of(backend) == "cpu":
        pytest.skip("too wide to be computed step by step")
    inputs = [torch.randn(3, 4, C).to(dtype), *maps(4, C, 16), torch.randn(3, C).to(dtype)]
    compare(sublayer, inputs, backend)


def test_more_tokens_than_16_bits_count(backend):
    """The last of 65,537 tokens, and the sums over all of them."""
    n, C, tokens = 2, 65, 65537
    require_support(backend, n, torch.float32)
    if backend == "triton" and device_of(backend) == "cpu":
        pytest.skip("too many to be computed step by step")
    inputs = [torch.randn(tokens, n, C), *maps(n, C, n * n), torch.randn(tokens, C)]
    compare(sublayer, inputs, backend, 4)


@pytest.mark.parametrize("case", ["all zero", "x100", "alpha 10"])
@pytest.mark.parametrize("numerics", ["paper", "deepseek_v4"])
def test_extreme_inputs(backend, case, numerics):
    n, C = 4, 24
    require_support(backend, n, torch.float32)
    inputs = [torch.randn(9, n, C), *maps(n, C, n * n), torch.randn(9, C)]
    if case == "all zero":
        inputs[0].zero_()
        inputs[4].zero_()
    elif case == "x100":
        inputs[0] *= 100
        inputs[4] *= 100
    else:
        inputs[2].fill_(10)
    # The tolerance allows for the rounding of logits of 10 in float32.
    compare(sublayer, inputs, backend, 3 if case == "alpha 10" else 1, numerics=numerics)


def test_saved_storages_are_freed_and_filled_again(backend):
    """As sharded parameters and offloaded activations are, between forward and backward."""
    n, C = 4, 24
    require_support(backend, n, torch.float32)
    given = [torch.randn(9, n, C), *maps(n, C, n * n), torch.randn(9, C)]

    def gradients(frees):
        leaves = [tensor.clone().to(device_of(backend)).requires_grad_() for tensor in given]
        outputs = sublayer(*leaves, backend=backend)
        if frees:
            sizes = [leaf.untyped_storage().nbytes() for leaf in leaves]
            for leaf in leaves:
                leaf.untyped_storage().resize_(0)
            others = [torch.full((size,), 255, dtype=torch.uint8) for size in sizes]
            for leaf, size, tensor in zip(leaves, sizes, given, strict=True):
                leaf.untyped_storage().resize_(size)
                leaf.untyped_storage().copy_(tensor.untyped_storage())
            del others
        return torch.autograd.grad(sum(out.sin().sum() for out in outputs), leaves)

    assert all(map(torch.equal, gradients(False), gradients(True)))
