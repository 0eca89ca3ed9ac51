"""Fused and separate calls of coefficients, read and write have the same bits.

So a model that a Stack has trained can run by the functions alone.
"""

import pytest
import torch

import manifold_hc as mhc
from manifold_hc import functional
from manifold_hc.constraints import CONSTRAINTS
from tests.kernels.test_contract import COMPILED, device_of, maps, require_support

SIZES = [(1, 7, 5), (2, 96, 20), (3, 530, 37), (4, 320, 33), (8, 40, 18), (16, 24, 3)]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=COMPILED)
def backend(request):
    return request.param


def small(backend, sizes):
    """Sizes, smaller ones for Triton's slow interpreter."""
    n, C, tokens = sizes
    stepwise = backend == "triton" and device_of(backend) == "cpu"
    return (min(n, 4), min(C, 24), 3) if stepwise else (n, C, tokens)


def inputs_of(backend, n, C, tokens, dtype, constraint="sinkhorn"):
    k = 0 if constraint == "identity" else n * n
    given = [torch.randn(tokens, n, C).to(dtype), *maps(n, C, k), torch.randn(tokens, C).to(dtype)]
    return [tensor.to(device_of(backend)).requires_grad_() for tensor in given]


def fused_calls(x, phi, alpha, bias, y, backend, **options):
    reading = functional.coefficients_and_read(x, phi, alpha, bias, backend=backend, **options)
    written = functional.write(x, y, reading.post, reading.res, backend, link=reading.link)
    return *reading[:3], reading.u, written


def separate_calls(x, phi, alpha, bias, y, backend, **options):
    pre, post, res = functional.coefficients(x, phi, alpha, bias, backend=backend, **options)
    return (
        pre,
        post,
        res,
        functional.read(x, pre, backend),
        functional.write(x, y, post, res, backend),
    )


def gradients(outputs, inputs):
    draw = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(out.shape, generator=draw).to(out.device) for out in outputs]
    loss = sum((out.float() * c).sum() for out, c in zip(outputs, cotangents, strict=True))
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("numerics", ["paper", "deepseek_v4"])
@pytest.mark.parametrize(
    "constraint", [name for name, row in CONSTRAINTS.items() if row.in_kernels]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_separate_calls_have_the_same_bits(backend, sizes, dtype, constraint, numerics):
    n, C, tokens = small(backend, sizes)
    require_support(backend, n, dtype)
    inputs = inputs_of(backend, n, C, tokens, dtype, constraint)
    options = {"constraint": constraint, "numerics": numerics, "backend": backend}
    options["iterations"] = 3
    one, other = fused_calls(*inputs, **options), separate_calls(*inputs, **options)
    for name, a, b in zip(("pre", "post", "res", "u", "written"), one, other, strict=True):
        assert torch.equal(a, b), name
    dx, *maps_and_y = gradients(one, inputs)
    dx_separate, *maps_and_y_separate = gradients(other, inputs)
    for name, a, b in zip(
        ("phi", "alpha", "bias", "y"), maps_and_y, maps_and_y_separate, strict=True
    ):
        assert torch.equal(a, b), name
    # Three ways lead to x, whose gradients are rounded before they are summed, or afterwards.
    rounding = 2**-20 if dtype == torch.float32 else 2**-7
    error = float((dx.float() - dx_separate.float()).norm() / dx.float().norm())
    assert error <= rounding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_separate_coefficients_alone_have_the_same_gradients(backend, sizes, dtype):
    """Gradients of x too, where u is not used."""
    n, C, tokens = small(backend, sizes)
    require_support(backend, n, dtype)
    *inputs, y = inputs_of(backend, n, C, tokens, dtype)
    one = fused_calls(*inputs, y, backend, iterations=3)[:3]
    other = functional.coefficients(*inputs, backend=backend, iterations=3)
    assert all(map(torch.equal, one, other))
    assert all(map(torch.equal, gradients(one, inputs), gradients(other, inputs)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_stack_by_functions_alone(dtype):
    """Boundaries in the Stack, calls one after another without it. Triton sums the projections of a
    boundary in another order."""
    n, C, tokens, backend = 4, 72, 21, "cpu"
    if backend not in COMPILED:
        pytest.skip("no CPU kernels here")
    config = mhc.ConnectionConfig(streams=n, backend=backend, phi_std=0.1, alpha=0.5)
    stack = mhc.Stack(C, config, 3)
    branches = [torch.sin, torch.cos, torch.tanh]
    h = torch.randn(tokens, C).to(dtype)
    x = functional.expand(h, n)
    with torch.no_grad():
        for connection, branch in zip(stack.connections, branches, strict=True):
            own = connection.maps
            pre, post, res = functional.coefficients(
                x, own.phi, own.alpha, own.bias, backend=backend
            )
            y = branch(functional.read(x, pre, backend))
            x = functional.write(x, y, post, res, backend)
        assert torch.equal(functional.collapse(x), stack(h, branches))
