"""Norms given to a stack: computed by the fused kernel if it supports them."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import manifold_hc as mhc
from manifold_hc import functional
from manifold_hc.config import ConnectionConfig
from manifold_hc.functional import InputNorm
from manifold_hc.kernels import backends, unsupported_reason
from manifold_hc.models.norm import RMSNorm

C, L = 16, 3
BACKENDS = [name for name in backends() if not unsupported_reason(name, 4, "cpu", [torch.float32])]

NORMS = {
    "torch's": lambda: nn.RMSNorm(C, eps=1e-5),
    "the decoder's": lambda: RMSNorm(C, eps=1e-5),
    "without an epsilon": lambda: nn.RMSNorm(C),
    "without a weight": lambda: nn.RMSNorm(C, eps=1e-5, elementwise_affine=False),
    "over tokens too": lambda: nn.RMSNorm((5, C), eps=1e-5),
    "of another kind": lambda: nn.LayerNorm(C),
    "a function": lambda: torch.tanh,
}
FUSED = ("torch's", "the decoder's")


def network(kind, **options):
    torch.manual_seed(0)
    norms = [NORMS[kind]() for _ in range(L)]
    for norm in norms:
        if getattr(norm, "weight", None) is not None:
            nn.init.normal_(norm.weight, 1, 0.3)
    stack = mhc.Stack(C, ConnectionConfig(phi_std=0.3, alpha=0.5, **options), L)
    return stack, [nn.Linear(C, C) for _ in range(L)], norms


def gradients(stack, branches, norms, inside, dtype=torch.float32):
    modules = [stack, *(m for m in (*branches, *norms) if isinstance(m, nn.Module))]
    for module in modules:
        module.to(dtype)
        module.zero_grad()
    torch.manual_seed(1)
    h = torch.randn(2, 5, C).to(dtype).requires_grad_()
    if inside:
        out = stack(h, [lambda u, n=n, b=b: b(n(u)) for n, b in zip(norms, branches, strict=True)])
    else:
        out = stack(h, branches, norms)
    out.float().square().sum().backward()
    return [out, h.grad, *(p.grad for m in modules for p in m.parameters() if p.grad is not None)]


@pytest.mark.parametrize("single_pass", [False, True], ids=["standard", "single-pass"])
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_given_norm_equals_the_norm_inside_the_branch(backend, kind, single_pass):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.06)):
        built = network(kind, backend=backend, single_pass=single_pass)
        pairs = [gradients(*built, inside, dtype) for inside in (False, True)]
        for a, b in zip(*pairs, strict=True):
            assert a.dtype == b.dtype
            assert (a - b).float().norm() <= tolerance * b.float().norm() + 1e-6


class Ran(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.fused = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ == "cpu_boundary":
            self.fused.append(args[9] is not None)
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no CPU backend here")
@pytest.mark.parametrize("kind", NORMS)
def test_norms_that_the_fused_kernel_computes(kind):
    stack, branches, norms = network(kind, backend="cpu")
    h = torch.randn(2, 5, C)
    with Ran() as ran:
        stack(h, branches, norms)
    assert ran.fused == [kind in FUSED] * (L - 1)
    if isinstance(norms[1], nn.Module):
        norms[1].register_forward_hook(lambda *_: None)
        with Ran() as ran:
            stack(h, branches, norms)
        assert ran.fused == [False, kind in FUSED]


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_uses_the_rounded_input_of_the_norm(backend):
    """u is kept in the streams' bfloat16; a gradient from an unrounded u is 0.2 % off."""
    torch.manual_seed(0)
    T, n = 3, 4
    x, y = torch.randn(T, n, C).bfloat16(), torch.randn(T, C).bfloat16()
    post, res = torch.rand(T, n), torch.rand(T, n, n)
    maps = (torch.randn(n * n + 2 * n, n * C), torch.ones(3), torch.randn(n * n + 2 * n))
    weight, grad = torch.randn(C).requires_grad_(), torch.randn(T, C).bfloat16()

    def boundary(norm):
        made = functional.boundary(x, y, post, res, *maps, input_norm=norm, backend=backend)
        return made.u

    boundary(InputNorm(weight, 1e-5)).backward(grad)
    u = boundary(None).double()
    inverse = (u.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    torch.testing.assert_close(
        weight.grad.double(), (grad * u * inverse).sum(0), rtol=1e-5, atol=1e-6
    )
