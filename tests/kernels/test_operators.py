"""The custom operators as PyTorch sees them: schemas, fakes, derivatives, torch.compile."""

import math
import subprocess
import sys

import pytest
import torch
from torch import library
from torch.utils._pytree import tree_leaves, tree_map_only

from manifold_hc import functional
from manifold_hc.kernels import backends, unsupported_reason
from manifold_hc.kernels.operator import NAMESPACE
from tests.kernels.compiled_networks import network, outputs_and_gradients

COMPILED = [
    name
    for name in backends()
    if name != "reference" and not unsupported_reason(name, 3, "cpu", [torch.float32])
]


def strided(tensor):
    """Every other element, between NaN."""
    room = torch.full([2 * size for size in tensor.shape], math.nan)
    view = room[tuple(slice(None, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


VIEWS = {
    "strided": strided,
    "transposed": lambda tensor: tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor,
    "expanded": lambda tensor: tensor[:1].expand(tensor.shape),
    "negated": lambda tensor: torch.complex(tensor, -tensor).conj().imag,
}


@pytest.fixture(params=COMPILED)
def backend(request):
    return request.param


def arguments(n=3, C=8, N=5):
    """Of every operator and of its derivative, by name."""
    R = 2 * n + n * n
    x, y, u = torch.randn(N, n, C), torch.randn(N, C), torch.randn(N, C)
    pre, res, phi = torch.rand(N, n), torch.rand(N, n, n), torch.randn(R, n * C)
    alpha, bias = torch.rand(3), torch.randn(R)
    projected, inverse_rms = torch.randn(N, R), torch.rand(N)
    settings = ("sinkhorn", 20, False, 1e-20, 0.0, True)
    streams, weight = (x.clone(), phi, alpha, bias), torch.rand(C)
    link = torch.zeros(()).expand(N, n, C)
    made = (res.clone(), projected, inverse_rms)
    grads = (x.clone(), u, pre.clone(), None, res.clone(), x.clone())
    return {
        "sinkhorn": ([res], (20, False, 0.0)),
        "sinkhorn_backward": ([res, res.clone()], (20, True, 1e-6)),
        "project": ([x.flatten(1), phi], (1e-6,)),
        "project_backward": ([projected, x.flatten(1), phi, projected.clone(), inverse_rms], ()),
        "read": ([x, pre], ()),
        "read_backward": ([u, x, pre], ()),
        "write": ([x, y, pre, res, link], ()),
        "write_backward": ([x, x.clone(), y, pre, res], ()),
        "branch_backward": ([x, y, pre], ()),
        "coefficients": ([x, phi, alpha, bias], settings),
        "coefficients_and_read": ([x, phi, alpha, bias], settings),
        "coefficients_and_read_backward": (
            [u, pre, None, res, x, *streams, *made],
            settings,
        ),
        "boundary": ([x, y, pre, res, None, link, phi, alpha, bias, weight], (1e-6, *settings)),
        "boundary_backward": (
            [*grads, x, y, pre, pre.clone(), phi, alpha, bias, weight, 1e-6, *made],
            settings,
        ),
        "rebuild": ([x, [y], [pre], [res], [pre, pre.clone()], [None, weight], [0.0, 0.1]], ()),
    }


# PyTorch 2.15's own check looks at gradients of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", arguments())
def test_opcheck(backend, name):
    tensors, numbers = arguments()[name]
    if not name.endswith(("_backward", "rebuild")):  # those have no derivative, by name
        tensors = [t if t is None else t.clone().requires_grad_() for t in tensors]
    operator = getattr(getattr(torch.ops, NAMESPACE), f"{backend}_{name}").default
    library.opcheck(operator, (*tensors, *numbers))


@pytest.mark.slow
def test_compiled_networks_compute_the_same(backend):
    """In a process of its own: Dynamo cannot trace the checks that the tests run under."""
    command = [sys.executable, "-m", "tests.kernels.compiled_networks", backend]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr


@pytest.mark.parametrize("name", arguments())
@pytest.mark.parametrize("layout", ["strided", "transposed", "expanded", "negated"])
def test_any_memory_layout_is_read_as_it_says(backend, name, layout):
    tensors, numbers = arguments()[name]
    operator = getattr(getattr(torch.ops, NAMESPACE), f"{backend}_{name}").default
    views = tree_map_only(torch.Tensor, VIEWS[layout], tensors)
    copies = tree_map_only(torch.Tensor, lambda view: view.clone().contiguous(), views)
    found, wanted = operator(*views, *numbers), operator(*copies, *numbers)
    for a, b in zip(tree_leaves(found), tree_leaves(wanted), strict=True):
        assert torch.equal(a, b)


def test_autocast_changes_nothing(backend):
    stack, h = network(backend), torch.randn(2, 5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = outputs_and_gradients(lambda h: stack(h, [torch.sin] * 3), stack, h)
    outside = outputs_and_gradients(lambda h: stack(h, [torch.sin] * 3), stack, h)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def test_streams_without_gradient_still_train_the_maps(backend):
    phi, alpha, bias = (
        t.requires_grad_() for t in (torch.randn(15, 24), torch.rand(3), torch.rand(15))
    )
    x = torch.randn(6, 3, 8)
    reading = functional.coefficients_and_read(x, phi, alpha, bias, backend=backend)
    functional.write(
        x, reading.u, reading.post, reading.res, backend, link=reading.link
    ).sum().backward()
    assert all(float(p.grad.abs().max()) > 0 for p in (phi, alpha, bias))


def test_a_link_is_not_materialised():
    """It has the shape of the streams, and no memory of its own."""
    if unsupported_reason("cpu", 4, "cpu", [torch.float32]):
        pytest.skip("no CPU kernels here")
    x, y, post, res = (torch.randn(shape) for shape in ((6, 4, 8), (6, 8), (6, 4), (6, 4, 4)))
    link = x.new_zeros(()).expand(x.shape)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ops.manifold_hc.cpu_write(x, y, post, res, link)
    names = {event.name for event in profile.events()}
    assert "manifold_hc::cpu_write" in names
    assert not names & {"aten::clone", "aten::contiguous", "aten::copy_"}
