"""Operators refuse every argument that a kernel would misread."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from manifold_hc import functional
from manifold_hc.config import ConnectionConfig
from manifold_hc.errors import BackendError, ConfigError, ManifoldError, ShapeError
from manifold_hc.kernels.arguments import MOST_ROWS, TENSORS, Arguments, Support
from manifold_hc.kernels.cpu import DTYPES
from manifold_hc.kernels.operator import NAMESPACE
from tests.kernels.test_operators import COMPILED, arguments


@pytest.fixture(params=COMPILED)
def backend(request):
    return request.param


def call_of(backend, name):
    """The operator and its arguments, which it takes."""
    tensors, numbers = arguments()[name]
    operator = getattr(getattr(torch.ops, NAMESPACE), f"{backend}_{name}").default
    return operator, [*tensors, *numbers]


def wrong_tensors(tensor, kind):
    """(description, tensor) of wrong tensors in index of a right one."""
    for dimension, size in enumerate(tensor.shape):
        yield (
            f"{size} + 1 at {dimension}",
            tensor.new_ones(*tensor.shape[:dimension], size + 1, *tensor.shape[dimension + 1 :]),
        )
        yield f"0 at {dimension}", tensor.narrow(dimension, 0, 0)
    yield "a dimension more", tensor.unsqueeze(0)
    yield "a dimension less", tensor.select(0, 0)
    yield "float64", tensor.double()
    yield "int32", tensor.int()
    yield "complex", tensor.to(torch.complex64)
    if kind == "wide":
        yield "bfloat16", tensor.bfloat16()
    yield "meta", tensor.to("meta")
    yield "sparse", tensor.to_sparse()


def wrong_calls(name, given):
    """Calls with one argument, or every n, changed."""
    names = [argument.name for argument in name._schema.arguments]
    for index, argument in enumerate(given):
        kind = TENSORS[names[index]][0] if names[index] in TENSORS else None
        if isinstance(argument, torch.Tensor):
            for case, wrong in wrong_tensors(argument, kind):
                yield f"{names[index]}: {case}", [*given[:index], wrong, *given[index + 1 :]]
        elif isinstance(argument, list):
            yield f"{names[index]}: shorter", [*given[:index], argument[1:], *given[index + 1 :]]
            for at, own in enumerate(argument):
                if isinstance(own, torch.Tensor):
                    for case, wrong in wrong_tensors(own, kind):
                        changed = [*argument[:at], wrong, *argument[at + 1 :]]
                        yield (
                            f"{names[index]}[{at}]: {case}",
                            [*given[:index], changed, *given[index + 1 :]],
                        )
        elif names[index] in WRONG_NUMBERS:
            for wrong in WRONG_NUMBERS[names[index]]:
                yield f"{names[index]} = {wrong}", [*given[:index], wrong, *given[index + 1 :]]


# C takes a float: 1e39 would be infinity there.
WRONG_EPSILONS = (-1.0, math.nan, math.inf, 1e39)

WRONG_NUMBERS = {
    "iterations": (0, -1, 1001, 2**31, 2**32, 10**7, 2**64),
    "constraint": ("exact", "", "identity"),
    "norm_eps": WRONG_EPSILONS,
    "hc_eps": WRONG_EPSILONS,
    "input_eps": WRONG_EPSILONS,
}


def accepts(operator, given):
    """Whether a kernel was called; that C refuses numbers as well does not count."""
    try:
        operator(*given)
    except (ManifoldError, RuntimeError, OverflowError, NotImplementedError) as error:
        return "was given a number out of its range" in str(error)
    return True


# Sizes that nothing else in the call has: another one is no mistake.
FREE = {
    # On meta alone it is computed there, which is nothing.
    "sinkhorn": ["logits: 5 + 1 at 0", "logits: 0 at 0", "logits: meta"],
    "project": ["v: 5 + 1 at 0", "v: 0 at 0", "phi: 15 + 1 at 0"],
    "read": ["x: 8 + 1 at 2"],
    "coefficients": ["x: 5 + 1 at 0", "x: 0 at 0"],
    "coefficients_and_read": ["x: 5 + 1 at 0", "x: 0 at 0"],
}


@pytest.mark.parametrize("name", arguments())
def test_wrong_arguments_are_refused(backend, name):
    operator, given = call_of(backend, name)
    operator(*given)
    wrong = dict(wrong_calls(operator, given))
    assert len(wrong) > 10
    assert [case for case, call in wrong.items() if accepts(operator, call)] == FREE.get(name, [])


@pytest.mark.parametrize("name", arguments())
def test_wrong_shapes_are_refused_where_nothing_is_computed(backend, name):
    """On meta tensors, and on those by which torch.compile asks for shapes."""
    operator, given = call_of(backend, name)
    wrong = {
        case: call
        for case, call in wrong_calls(operator, given)
        if "+ 1" in case or "dimension" in case or "float64" in case
    }

    def moved(call, change):
        return tree_map_only(torch.Tensor, change, call)

    for where in ("meta", "fake"):
        mode = FakeTensorMode()
        change = mode.from_tensor if where == "fake" else (lambda tensor: tensor.to("meta"))
        with mode if where == "fake" else nullcontext():
            operator(*moved(given, change))
            taken = [case for case, call in wrong.items() if accepts(operator, moved(call, change))]
        assert taken == [case for case in FREE.get(name, []) if case in wrong], where


@pytest.mark.parametrize("n", [0, 17, 33])
@pytest.mark.parametrize("name", arguments())
def test_numbers_of_streams_that_no_kernel_has(backend, name, n):
    if name in ("project", "project_backward"):
        pytest.skip("takes no streams")
    tensors, numbers = arguments(n=n)[name]
    operator, _ = call_of(backend, name)
    with pytest.raises(BackendError, match=f"{backend}_{name}: takes .* streams but there are {n}"):
        operator(*tensors, *numbers)


def test_no_channels(backend):
    """A kernel divides by the number of channels."""
    for name in arguments():
        if "sinkhorn" in name:
            continue
        tensors, numbers = arguments(C=0)[name]
        operator, _ = call_of(backend, name)
        with pytest.raises(ShapeError, match=f"{backend}_{name}: needs channels"):
            operator(*tensors, *numbers)


@pytest.mark.parametrize("shape", [(1, 0), (0, 4), (MOST_ROWS + 1, 1)], ids=str)
def test_sizes_of_phi_that_no_kernel_has(backend, shape):
    operator, _ = call_of(backend, "project")
    phi = torch.zeros(()).expand(shape)
    with pytest.raises(ShapeError, match=f"{backend}_project: needs .* 1 to {MOST_ROWS} rows"):
        operator(torch.zeros(2, shape[1]), phi, 0.0)


def test_a_device_that_the_backend_does_not_have():
    check = Arguments("op", "(Tensor x, Tensor pre) -> Tensor", Support(("cuda",), [3], DTYPES))
    given = torch.zeros(2, 3, 4), torch.zeros(2, 3)
    for computes in (True, False):
        with pytest.raises(BackendError, match="op: computes on cuda but tensors are on cpu; move"):
            check(given, computes)
    shapes = [tensor.to("meta") for tensor in given]
    check(shapes, computes=False)
    with pytest.raises(BackendError, match="op: computes on cuda but tensors are on meta; move"):
        check(shapes, computes=True)


def test_a_refusal_says_which_argument(backend):
    operator, (x, pre) = call_of(backend, "read")
    with pytest.raises(ManifoldError, match=rf"{backend}_read: pre must be .* \[5, 3\] but is \[5"):
        operator(x, pre[:, :2])


@pytest.mark.parametrize("backend", ["reference", *COMPILED])
@pytest.mark.parametrize("iterations", [1001, 10**7, 2**31, 2**32, 2**64])
def test_too_many_iterations(backend, iterations):
    with pytest.raises(ConfigError, match=f"from 1 to 1000 but is {iterations}; constraint="):
        functional.sinkhorn(torch.zeros(1, 2, 2), iterations, backend=backend)
    with pytest.raises(ConfigError, match=f"iterations: must be at most 1000 but is {iterations}"):
        ConnectionConfig(iterations=iterations)


def test_as_many_iterations_as_there_may_be(backend):
    if backend == "triton":
        pytest.skip("step by step, a thousand steps take a minute")
    logits = torch.randn(20, 4, 4, requires_grad=True)
    exact = logits.detach().double().requires_grad_()
    got = functional.sinkhorn(logits, 1000, backend=backend)
    wanted = functional.sinkhorn(exact, 1000, backend="reference")
    cotangent = torch.randn(20, 4, 4)
    got.backward(cotangent)
    wanted.backward(cotangent.double())
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=0, atol=1e-4)
