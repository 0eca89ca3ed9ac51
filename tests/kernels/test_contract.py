"""One contract for every operator, backend, dtype and shape: the reference in float64 decides."""

import math

import pytest
import torch

from manifold_hc import functional
from manifold_hc.constraints import CONSTRAINTS
from manifold_hc.kernels import backends, unsupported_reason


def device_of(backend):
    """Device that the backend is tested on: a GPU for Triton, or the CPU with its interpreter."""
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


COMPILED = [
    name
    for name in backends()
    if name != "reference" and not unsupported_reason(name, 4, device_of(name), [torch.float32])
]


SHAPES = [(), (0,), (1,), (33,), (2, 3)]
STREAMS = [1, 2, 3, 4, 5, 6, 7, 8, 16]
CHANNELS = [1, 7, 32]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# Largest relative error, in the norm of a token's matrix or of a whole tensor. Streams and their
# gradients are rounded once to their own dtype; coefficients are float32 with every dtype.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
COEFFICIENTS = 1e-5
# A GPU multiplies half-width streams by phi in tf32, as the paper does.
TF32 = 2.0**-10


@pytest.fixture(autouse=True)
def poisoned():
    """New memory holds NaN until it is written."""
    torch.use_deterministic_algorithms(True)  # fills it
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=COMPILED)
def backend(request):
    return request.param


def require_support(backend, n, dtype):
    if reason := unsupported_reason(backend, n, device_of(backend), [dtype, torch.float32]):
        pytest.skip(f"{backend} {reason}")


def maps(n, C, k, std=0.5):
    rows = 2 * n + k
    phi = std * torch.randn(rows, n * C) / math.sqrt(n * C)
    return phi, torch.tensor([0.7, 1.3, 0.9]), std * torch.randn(rows)


def sublayer(x, phi, alpha, bias, y, *, backend, **options):
    """Everything that a Connection computes: both operators that share a backward."""
    reading = functional.coefficients_and_read(x, phi, alpha, bias, backend=backend, **options)
    written = functional.write(x, y, reading.post, reading.res, backend, link=reading.link)
    return reading.pre, reading.post, reading.res, reading.u, written


def boundary(
    x, y, phi, alpha, bias, next_phi, next_alpha, next_bias, z, weight,
    *, backend, single_pass=False, norm=False, linked=True, **options,
):  # fmt: skip
    """Two sublayers and the boundary between them: the fused operator and both neighbours."""
    before = functional.coefficients_and_read(x, phi, alpha, bias, backend=backend, **options)
    after = functional.boundary(
        x,
        y,
        before.post,
        before.res,
        next_phi,
        next_alpha,
        next_bias,
        pre=before.pre if single_pass else None,
        input_norm=functional.InputNorm(weight, 0.1) if norm else None,
        link=before.link if linked else None,
        backend=backend,
        **options,
    )
    written = functional.write(after.x, z, after.post, after.res, backend, link=after.link)
    made = (after.pre, after.post, after.res, after.u, after.x)
    return *made, before.u, written, *(() if norm else (weight + 0,))


def neighbours(shape, n, C, dtype, k):
    """The inputs of `boundary`."""
    x, y, z = (torch.randn(*shape, *own).to(dtype) for own in ((n, C), (C,), (C,)))
    return [x, y, *maps(n, C, k), *maps(n, C, k), z, 1 + 0.5 * torch.randn(C)]


def compare(function, inputs, backend, factor=1.0, **options):
    """Outputs and all gradients of `function` against the float64 reference.

    The error of the reference itself in the inputs' own dtype is allowed: a sum that cancels, a
    matrix that is nearly singular.
    """
    in_tf32 = device_of(backend) == "cuda" and inputs[0].dtype != torch.float32
    products = TF32 if in_tf32 else COEFFICIENTS
    if function is boundary:
        # Values between two sublayers are rounded to the streams' dtype, forward and backward, and
        # then summed over tokens, where they may cancel.
        products, factor = max(products, ROUNDING[inputs[0].dtype]), 3 * factor
    exact = [tensor.double() for tensor in inputs]
    got, ours = run(function, inputs, backend, **options)
    plain, theirs = run(function, inputs, "reference", **options)
    wanted, judge = run(function, exact, "reference", **options)
    for name, *tensors in [("output", *row) for row in zip(got, plain, wanted, strict=True)] + [
        (f"gradient of input {index}", *row)
        for index, row in enumerate(zip(ours, theirs, judge, strict=True))
    ]:
        assert_close(*tensors, factor, products, name)
    with torch.no_grad():
        moved = [tensor.to(device_of(backend)) for tensor in inputs]
        again = as_tuple(function(*moved, backend=backend, **options))
    assert all(torch.equal(a, b.cpu()) for a, b in zip(got, again, strict=True))


def run(function, inputs, backend, **options):
    """Outputs, and the inputs' gradients for cotangents that are the same for every backend."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    moved = [leaf.to(device_of(backend)) for leaf in leaves]
    outputs = tuple(out.cpu() for out in as_tuple(function(*moved, backend=backend, **options)))
    draw = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(out.shape, generator=draw).bfloat16() for out in outputs]
    loss = sum((out * c.to(out.dtype)).sum() for out, c in zip(outputs, cotangents, strict=True))
    return outputs, torch.autograd.grad(loss, leaves)


def as_tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def assert_close(ours, plain, wanted, factor, products, name):
    assert (ours.shape, ours.dtype) == (plain.shape, plain.dtype)
    error, open_ = ((tensor.double() - wanted).norm() for tensor in (ours, plain))
    tolerance = factor * (ROUNDING[ours.dtype] + products) * wanted.norm() + 4 * open_
    assert error <= tolerance + 1e-30, f"{name}: {error / wanted.norm():.1e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numerics", ["paper", "deepseek_v4"])
@pytest.mark.parametrize("C", CHANNELS)
@pytest.mark.parametrize("n", STREAMS)
def test_a_sublayer(backend, n, C, numerics, dtype):
    require_support(backend, n, dtype)
    for shape in SHAPES:
        inputs = [torch.randn(*shape, n, C).to(dtype), *maps(n, C, n * n)]
        inputs.append(torch.randn(*shape, C).to(dtype))
        compare(sublayer, inputs, backend, numerics=numerics)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("single_pass", [False, True], ids=["standard", "single-pass"])
@pytest.mark.parametrize("n", STREAMS)
def test_a_boundary(backend, n, single_pass, norm, dtype):
    require_support(backend, n, dtype)
    for shape, C in [((0,), 8), ((2, 3), 7), ((33,), 32)]:
        inputs = neighbours(shape, n, C, dtype, n * n)
        compare(boundary, inputs, backend, single_pass=single_pass, norm=norm)


@pytest.mark.parametrize("numerics", ["paper", "deepseek_v4"])
@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("linked", [False, True], ids=["alone", "linked"])
def test_a_boundary_of_every_constraint(backend, constraint, linked, numerics):
    n = 4
    require_support(backend, n, torch.float32)
    inputs = neighbours((19,), n, 24, torch.float32, CONSTRAINTS[constraint].size(n))
    options = {"constraint": constraint, "numerics": numerics, "linked": linked}
    for single_pass in (False, True):
        compare(boundary, inputs, backend, single_pass=single_pass, norm=linked, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_beyond_every_block_chunk_and_slice(backend, dtype):
    for tokens, n, C in [(300, 3, 530), (129, 4, 1280), (4200, 2, 24)]:
        require_support(backend, n, dtype)
        inputs = [torch.randn(tokens, n, C).to(dtype), *maps(n, C, n * n)]
        inputs.append(torch.randn(tokens, C).to(dtype))
        compare(sublayer, inputs, backend)
        compare(boundary, neighbours((tokens,), n, C, dtype, n * n), backend, norm=n == 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", STREAMS)
def test_rebuild_has_the_same_bits(backend, n, dtype):
    """The bits of separate calls and of a boundary."""
    require_support(backend, n, dtype)
    for shape, C in [((), 8), ((0,), 8), ((2, 3), 37), ((40,), 530)]:
        moved = [t.to(device_of(backend)) for t in neighbours(shape, n, C, dtype, n * n)]
        x, y, phi, alpha, bias, next_phi, next_alpha, next_bias, z, weight = moved
        second = (next_phi, next_alpha, next_bias)
        for single_pass in (False, True):
            before = functional.coefficients_and_read(x, phi, alpha, bias, backend=backend)
            weights = before.pre if single_pass else None
            coefficients = (x, y, before.post, before.res)
            after = functional.boundary(*coefficients, *second, pre=weights, backend=backend)
            last = functional.write(after.x, z, after.post, after.res, backend)
            read = functional.read(last, after.pre, backend)
            assert torch.equal(after.x, functional.write(*coefficients, backend))
            writes = [(y, before.post, before.res), (z, after.post, after.res)]
            reads = [before.pre, after.read_weights, after.pre]
            streams, inputs = functional.rebuild(x, writes, reads, backend=backend)
            assert all(map(torch.equal, streams, (after.x, last)))
            assert all(map(torch.equal, inputs, (before.u, after.u, read)))
            ((), (alone,)) = functional.rebuild(x, [], reads[:1], backend=backend)
            assert torch.equal(alone, before.u)
            norm = functional.InputNorm(weight, 0.1)
            normed = functional.boundary(
                *coefficients, *second, pre=weights, input_norm=norm, backend=backend
            )
            _, inputs = functional.rebuild(x, writes[:1], reads[:2], [None, norm], backend)
            assert all(map(torch.equal, inputs, (before.u, normed.u)))


def test_rebuilding_takes_branches_of_several_dtypes(backend):
    require_support(backend, 3, torch.float32)
    x, weights, res = torch.randn(5, 3, 8), torch.rand(5, 3), torch.rand(5, 3, 3)
    x, weights, res = (tensor.to(device_of(backend)) for tensor in (x, weights, res))
    branches = [x[:, 0], x[:, 1].bfloat16()]
    writes = [(y, weights, res) for y in branches]
    streams, _ = functional.rebuild(x, writes, [weights] * 3, backend=backend)
    for before, y, after in zip([x, *streams], branches, streams, strict=False):
        assert torch.equal(functional.write(before, y, weights, res, backend), after)


@pytest.mark.parametrize("numerics", ["paper", "deepseek_v4"])
@pytest.mark.parametrize("constraint", [name for name in CONSTRAINTS if name != "sinkhorn"])
def test_every_constraint(backend, constraint, numerics):
    n, C, dtype = 4, 24, torch.float32
    require_support(backend, n, dtype)
    size = CONSTRAINTS[constraint].size(n)
    inputs = [torch.randn(19, n, C), *maps(n, C, size), torch.randn(19, C)]
    compare(sublayer, inputs, backend, constraint=constraint, numerics=numerics)


@pytest.mark.parametrize(
    "options",
    [
        {"numerics": "paper", "norm_eps": 0.3, "iterations": 3},
        {"numerics": "deepseek_v4", "norm_eps": 0.3, "iterations": 1},
        {"numerics": "deepseek_v4", "hc_eps": 0.02, "iterations": 2},
        {"numerics": "deepseek_v4", "hc_eps": 0.0},
    ],
    ids=str,
)
def test_every_number_arrives(backend, options):
    n, C = 3, 24
    require_support(backend, n, torch.float32)
    inputs = [torch.randn(19, n, C), *maps(n, C, n * n), torch.randn(19, C)]
    compare(sublayer, inputs, backend, **options)
    x, phi, alpha, bias, _ = inputs
    exits = [x, phi[:n], alpha[:1], bias[:n]]
    epsilons = {name: number for name, number in options.items() if name != "iterations"}
    compare(functional.exit_coefficients, exits, backend, **epsilons)


@pytest.mark.parametrize("branch", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("streams", [torch.float32, torch.bfloat16])
def test_a_branch_of_another_dtype(backend, streams, branch):
    n, C = 4, 24
    require_support(backend, n, streams)
    x, y, *maps_and_z, weight = neighbours((19,), n, C, streams, n * n)
    inputs = [x, y.to(branch), *maps_and_z[:6], maps_and_z[6].to(branch), weight]
    compare(boundary, inputs, backend)
    inputs = [torch.randn(19, n, C).to(streams), torch.randn(19, C).to(branch)]
    inputs += [torch.rand(19, n), torch.rand(19, n, n)]
    compare(functional.write, inputs, backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", STREAMS)
def test_operators_alone(backend, n, dtype):
    require_support(backend, n, dtype)
    C = 37
    for shape in SHAPES:
        x, y = torch.randn(*shape, n, C).to(dtype), torch.randn(*shape, C).to(dtype)
        weights, res = torch.randn(*shape, n), torch.randn(*shape, n, n)
        compare(functional.read, [x, weights], backend)
        compare(functional.write, [x, y, weights, res], backend)
        compare(functional.collapse, [x, weights], backend)
        compare(functional.coefficients, [x, *maps(n, C, n * n)], backend)
        phi, alpha, bias = maps(n, C, n * n)
        compare(functional.exit_coefficients, [x, phi[:n], alpha[:1], bias[:n]], backend)
        phi = torch.randn(2 + n, C) / math.sqrt(C)
        compare(functional.hc_coefficients, [x, phi, alpha, bias], backend)


def test_what_broadcasts_and_what_is_not_contiguous(backend):
    n, C = 3, 10
    require_support(backend, n, torch.float32)
    x, y = torch.randn(C, n, 4, 5).permute(2, 3, 1, 0), torch.randn(C, 5, 4).permute(2, 1, 0)
    inputs = [x, y, torch.rand(5, n), torch.rand(4, 1, n, n).mT]
    compare(functional.write, inputs, backend)
    compare(functional.read, [x, torch.rand(n)], backend)
    compare(sublayer, [x, *maps(n, C, n * n), y], backend)
    *_, bias = maps(n, C, n * n)
    compare(
        lambda x, bias, y, backend: sublayer(x, None, None, bias, y, backend=backend),
        [x, bias, y],
        backend,
    )


@pytest.mark.parametrize("numerics", ["paper", "deepseek_v4"])
@pytest.mark.parametrize("n", STREAMS)
@pytest.mark.parametrize("std", [0.0, 0.1, 1.0, 4.0, 16.0])
def test_sinkhorn_by_matrix(backend, n, std, numerics):
    """Every matrix counts: a batch's norm would hide a wrong one."""
    require_support(backend, n, torch.float32)
    logits = std * torch.randn(200, n, n)
    ours, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    got = functional.sinkhorn(ours.to(device_of(backend)), 20, numerics, backend).cpu()
    wanted = functional.sinkhorn(exact, 20, numerics, "reference")
    cotangent = torch.randn(200, n, n)
    got.backward(cotangent)
    wanted.backward(cotangent.double())
    # A logit's rounding is 6e-8 of its size, and 40 normalisations pass it on: at 16 the input
    # itself leaves that open, measured by moving the exact input by as much.
    moved = logits.double() * (1 + 6e-8 * torch.randn(200, n, n, dtype=torch.float64))
    moved = moved.requires_grad_()
    shifted = functional.sinkhorn(moved, 20, numerics, "reference")
    shifted.backward(cotangent.double())
    for a, b, c in ((got, wanted, shifted), (ours.grad, exact.grad, moved.grad)):
        error, scale = (a - b).flatten(1).norm(dim=1), b.flatten(1).norm(dim=1)
        open_ = (c - b).flatten(1).norm(dim=1)
        cotangents = cotangent.flatten(1).norm(dim=1) if a is ours.grad else scale
        assert (error <= 1e-5 * scale + 30 * open_ + 4e-6 * cotangents).all()


def test_initial_sums_are_one_to_an_ulp(backend):
    """All sublayers start with this matrix: an error in its sums would grow with the depth."""
    require_support(backend, 4, torch.float32)
    logits = torch.tensor(CONSTRAINTS["sinkhorn"].initial(4)).view(1, 4, 4)
    res = functional.sinkhorn(logits.to(device_of(backend)), backend=backend).double().cpu()
    for sums in (res.sum(-1), res.sum(-2)):
        assert (sums - 1).abs().max() < 6e-8  # one ulp below 1


@pytest.mark.parametrize("where", ["row", "column", "entry"])
def test_faded_rows_are_never_nan(backend, where):
    """120 below the rest is 0 in float32; the logarithm knows better."""
    require_support(backend, 4, torch.float32)
    logits = torch.randn(40, 4, 4)
    logits[20:][
        {"row": (..., 1, slice(None)), "column": (..., 2), "entry": (..., 1, 2)}[where]
    ] -= 120
    compare(lambda m, backend: functional.sinkhorn(m, 20, "paper", backend), [logits], backend, 3)


def test_nan_in_nan_out(backend):
    require_support(backend, 3, torch.float32)
    x = torch.randn(40, 3, 8)
    x[17, 1, 5] = math.nan
    inputs = [x, *maps(3, 8, 9), torch.randn(40, 8)]
    for out in sublayer(*(tensor.to(device_of(backend)) for tensor in inputs), backend=backend):
        bad = out.flatten(1).isnan().any(1)
        assert bad.tolist() == [token == 17 for token in range(40)]


def test_rounding_to_bfloat16_is_torchs(backend):
    """Halves of neighbours' sums: most are ties, which go to even. NaN of every kind stays."""
    require_support(backend, 2, torch.bfloat16)
    if backend == "triton" and device_of(backend) == "cpu":
        pytest.skip("Triton's interpreter truncates instead of rounding")
    bits = torch.randint(0x3000, 0x5000, (4000,), dtype=torch.int16)
    x = torch.stack([bits, bits + 1], -1).view(torch.bfloat16).view(100, 40, 2).mT.contiguous()
    x, halves = x.to(device_of(backend)), torch.full((2,), 0.5, device=device_of(backend))
    u = functional.read(x, halves, backend)
    assert torch.equal(u, (0.5 * x[:, 0].float() + 0.5 * x[:, 1].float()).bfloat16())
    nan = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    assert functional.read(x, nan.to(x.device), backend).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_with_any_number_of_threads(backend, dtype):
    require_support(backend, 4, dtype)
    if backend == "triton":
        pytest.skip("a GPU has threads of its own")
    inputs = neighbours((517,), 4, 40, dtype, 16)
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        leaves = [t.clone().to(device_of(backend)).requires_grad_() for t in inputs]
        outputs = boundary(*leaves, norm=True, backend=backend)
        sum((out.float() * out.float().sin()).sum() for out in outputs).backward()
        results.append([*outputs, *(leaf.grad for leaf in leaves)])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("missing", ["u", "pre", "post", "res", "written"])
def test_unused_outputs(backend, missing):
    """A gradient that does not arrive counts as zero, and the link's too."""
    require_support(backend, 4, torch.float32)
    keep = [name for name in ("pre", "post", "res", "u", "written") if name != missing]

    def some(*inputs, backend):
        names = ("pre", "post", "res", "u", "written")
        outputs = dict(zip(names, sublayer(*inputs, backend=backend), strict=True))
        return tuple(outputs[name] for name in keep)

    inputs = [torch.randn(21, 4, 12), *maps(4, 12, 16), torch.randn(21, 12)]
    if missing == "written":
        compare(
            lambda x, p, a, b, backend: some(x, p, a, b, inputs[4], backend=backend),
            inputs[:4],
            backend,
        )
    else:
        compare(some, inputs, backend)


@pytest.mark.parametrize("used", range(7))
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("single_pass", [False, True], ids=["standard", "single-pass"])
def test_outputs_of_a_boundary_one_at_a_time(backend, used, norm, single_pass):
    require_support(backend, 4, torch.float32)
    inputs = neighbours((21,), 4, 12, torch.float32, 16)

    def one(*inputs, backend):
        outputs = boundary(*inputs, single_pass=single_pass, norm=norm, backend=backend)
        return outputs[used], sum(0 * t.sum() for t in inputs)  # every input has a gradient

    compare(one, inputs, backend)


def test_res_that_does_not_learn(backend):
    """Its logits' rows of phi and bias get nothing, whichever way a gradient would come."""
    require_support(backend, 3, torch.float32)
    for function, inputs in (
        (sublayer, [torch.randn(9, 3, 8), *maps(3, 8, 9), torch.randn(9, 8)]),
        (boundary, neighbours((9,), 3, 8, torch.float32, 9)),
    ):
        compare(function, inputs, backend, learn_res=False)
        _, gradients = run(function, inputs, backend, learn_res=False)
        for gradient in gradients[1:-1]:
            if gradient.shape in ((15, 24), (15,)):
                assert not gradient[6:].any()
                assert gradient[:6].any()


def test_a_write_with_another_res_does_without_the_link(backend):
    require_support(backend, 3, torch.float32)
    inputs = [torch.randn(9, 3, 8), *maps(3, 8, 9), torch.randn(9, 8)]

    def changed(x, phi, alpha, bias, y, backend):
        reading = functional.coefficients_and_read(x, phi, alpha, bias, backend=backend)
        written = functional.write(
            x, y, reading.post, reading.res.square(), backend, link=reading.link
        )
        return reading.u, written

    compare(changed, inputs, backend)


def test_a_write_of_other_streams_does_without_the_link(backend):
    require_support(backend, 3, torch.float32)
    inputs = [torch.randn(9, 3, 8), *maps(3, 8, 9), torch.randn(9, 8)]

    def stopped(x, phi, alpha, bias, y, backend):
        reading = functional.coefficients_and_read(x, phi, alpha, bias, backend=backend)
        others = 2 * x.detach()
        written = functional.write(others, y, reading.post, reading.res, backend, link=reading.link)
        return reading.u, written

    compare(stopped, inputs, backend)


def test_second_derivatives_are_refused_by_name(backend):
    from manifold_hc.errors import BackendError

    require_support(backend, 3, torch.float32)
    x, pre = torch.randn(5, 3, 8), torch.rand(5, 3)
    x, pre = (tensor.to(device_of(backend)).requires_grad_() for tensor in (x, pre))
    u = functional.read(x, pre, backend)
    (gradient,) = torch.autograd.grad(u.square().sum(), x, create_graph=True)
    with pytest.raises(BackendError, match='first derivatives only; use backend="reference"'):
        gradient.sum().backward()
