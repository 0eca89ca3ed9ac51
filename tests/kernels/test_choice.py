"""Choice of a backend, and the error of a named one that does not support a call."""

import pytest
import torch
from torch.autograd import forward_ad

from manifold_hc import functional, kernels
from manifold_hc.errors import BackendError, ShapeError


def streams(n=4, dtype=torch.float32, device="cpu"):
    x = torch.zeros(3, n, 8, dtype=dtype, device=device)
    return x, torch.zeros(3, n, device=device)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (streams(17), "takes at most 16 streams but there are 17; use fewer"),
        (
            streams(dtype=torch.float16),
            "takes streams in float32 or bfloat16 but they are torch.float16; convert x",
        ),
        (streams(device="meta"), "computes on the CPU but x is on meta; move x"),
        (
            (streams()[0], streams()[1].double()),
            "takes the other tensors in float32 but one is torch.float64; convert it",
        ),
    ],
    ids=["streams", "dtype", "device", "coefficients"],
)
def test_a_named_backend_never_falls_back(arguments, reason):
    with pytest.raises(BackendError) as caught:
        functional.read(*arguments, backend="cpu")
    assert str(caught.value) == f'read: backend "cpu" {reason}; or use backend="auto"'
    assert functional.read(*arguments).shape == (3, 8)


def test_everything_of_a_call_is_on_one_device():
    x, post = streams()
    res, y = torch.zeros(3, 4, 4), torch.zeros(3, 8, device="meta")
    with pytest.raises(ShapeError, match="write: y must be on cpu like x but is on meta; move"):
        functional.write(x, y, post, res)
    with pytest.raises(ShapeError, match="write: res must be on cpu like x but is on meta; move"):
        functional.write(x, torch.zeros(3, 8), post, res.to("meta"))


def test_auto_prefers_what_is_fast():
    assert kernels.backends()[-1] == "reference"
    x, pre = streams()
    assert "cpu_read" in str(functional.read(x.requires_grad_(), pre).grad_fn.next_functions)
    assert "cpu" not in str(functional.read(x.double(), pre).grad_fn.name())


def transforms():
    """Derivatives that a custom operator has not, of a read."""
    x, pre = torch.randn(3, 4, 8), torch.rand(3, 4)

    def loss(x, backend):
        return functional.read(x, pre, backend).sin().sum()

    def dual(backend):
        with forward_ad.dual_level():
            out = loss(forward_ad.make_dual(x, torch.ones_like(x)), backend)
            return forward_ad.unpack_dual(out).tangent

    return {
        "grad": lambda backend: torch.func.grad(loss)(x, backend),
        "jvp": lambda backend: torch.func.jvp(lambda x: loss(x, backend), (x,), (x,))[1],
        "hessian": lambda backend: torch.func.hessian(loss)(x, backend),
        "dual numbers": dual,
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", transforms())
def test_other_derivatives_are_the_references(name):
    """auto takes it by itself; a named backend says so instead of returning zeros."""
    torch.manual_seed(0)
    derivative = transforms()[name]
    wanted = derivative("reference")
    assert wanted.abs().max() > 0
    torch.testing.assert_close(derivative("auto"), wanted)
    with pytest.raises(BackendError, match='read: backend "cpu" has derivatives by autograd alone'):
        derivative("cpu")


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_needs_no_other_backend():
    x, pre = torch.randn(3, 4, 8), torch.rand(3, 4)
    mapped = torch.func.vmap(lambda x, pre: functional.read(x, pre, "cpu"))(x, pre)
    torch.testing.assert_close(mapped, functional.read(x, pre, "reference"))
