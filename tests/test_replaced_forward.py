"""A norm with a replaced forward is not computed by the fused kernel."""

import functools
import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import manifold_hc as mhc
from manifold_hc.config import ConnectionConfig
from manifold_hc.functional import InputNorm
from manifold_hc.models.norm import RMSNorm

C = 16


class Authors(nn.RMSNorm):
    """A third-party norm that declares its computation by `input_norm`."""

    def forward(self, x):
        return nn.functional.rms_norm(x, self.normalized_shape, self.weight, self.eps)

    def input_norm(self, dtype):
        return InputNorm(self.weight.float(), self.eps)


KINDS = (nn.RMSNorm, nn.RMSNorm, RMSNorm, Authors)
"""Norm class of every sublayer; no fused kernel computes the first norm of a stack."""
L = len(KINDS)


def replacement(ran):
    """Replacement of a forward: twice the norm, minus a third."""

    def run(x):
        ran.update(["replaced"])
        return 2 * nn.functional.rms_norm(x, (C,), eps=1e-5) - 1 / 3

    return run


class Shifted(nn.Module):
    def forward(self, weight):
        return weight + 3


def on_the_instance(norm, ran, patch):
    norm.forward = replacement(ran)
    return norm


def in_its_call(norm, ran, patch):
    norm._call_impl = replacement(ran)
    return norm


def on_the_class(norm, ran, patch):
    run = replacement(ran)
    patch.setattr(type(norm), "forward", lambda self, x: run(x))
    return norm


def on_the_class_and_in_its_name(norm, ran, patch):
    run, kind = replacement(ran), type(norm)
    patch.setattr(kind, "forward", functools.wraps(kind.forward)(lambda self, x: run(x)))
    return norm


def on_the_class_by_a_namesake(norm, ran, patch):
    run, kind = replacement(ran), type(norm)

    def forward(self, x):
        return run(x)

    forward.__code__ = forward.__code__.replace(co_qualname=f"{kind.__qualname__}.forward")
    forward.__module__ = "elsewhere"
    patch.setattr(kind, "forward", forward)
    return norm


def on_every_call(norm, ran, patch):
    run = replacement(ran)
    patch.setattr(type(norm), "__call__", lambda self, x: run(x))
    return norm


def by_a_subclass(norm, ran, patch):
    run = replacement(ran)
    norm.__class__ = type("Own", (type(norm),), {"forward": lambda self, x: run(x)})
    return norm


def by_a_subclass_in_its_call(norm, ran, patch):
    run = replacement(ran)
    norm.__class__ = type("Own", (type(norm),), {"__call__": lambda self, x: run(x)})
    return norm


def bound_to_arguments(norm, ran, patch):
    return functools.partial(lambda run, x: run(x), replacement(ran))


def compiled(norm, ran, patch):
    norm._compiled_call_impl = replacement(ran)  # as norm.compile() does
    return norm


def hooked(norm, ran, patch):
    run = replacement(ran)
    norm.register_forward_hook(lambda module, arguments, made: run(arguments[0]))
    return norm


def parametrized(norm, ran, patch):
    parametrize.register_parametrization(norm, "weight", Shifted())
    shifted = norm.parametrizations.weight[0]
    shifted.register_forward_hook(lambda *_: ran.update(["replaced"]))
    return norm


WAYS = (
    *(on_the_instance, in_its_call, on_every_call),
    *(on_the_class, on_the_class_and_in_its_name, on_the_class_by_a_namesake),
    *(by_a_subclass, by_a_subclass_in_its_call, bound_to_arguments, compiled, hooked, parametrized),
)


@pytest.mark.parametrize("recompute", [None, 2])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_replaced_forward_runs_once_per_sublayer(way, recompute, monkeypatch):
    """Outputs and gradients are those of the same norms inside the branches."""
    ran = Counter()
    stack = mhc.Stack(C, ConnectionConfig(phi_std=0.3), L, recompute)
    branches = [nn.Linear(C, C) for _ in range(L)]
    norms = [way(kind(C, eps=1e-5), ran, monkeypatch) for kind in KINDS]
    h, found = torch.randn(2, 5, C, requires_grad=True), []
    ran.clear()
    for inside in (True, False):
        if inside:
            pairs = zip(norms, branches, strict=True)
            out = stack(h, [lambda u, n=n, b=b: b(n(u)) for n, b in pairs])
        else:
            out = stack(h, branches, norms)
        (gradient,) = torch.autograd.grad(out.square().sum(), h)
        found.append((out, gradient, ran["replaced"]))
        ran.clear()
    assert found[0][2] == found[1][2] >= L
    for a, b in zip(found[0][:2], found[1][:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


PATCHED_FIRST = """
import torch
from torch import nn
nn.RMSNorm.forward = lambda norm, x: 2 * x + norm.weight
import manifold_hc as mhc
stack, norms = mhc.Stack(8, sublayers=2), [nn.RMSNorm(8, eps=1e-5) for _ in range(2)]
h = torch.randn(3, 8)
inside = stack(h, [lambda u: (2 * u + 1).sin()] * 2)
torch.testing.assert_close(stack(h, [torch.sin] * 2, norms), inside)
"""


@pytest.mark.slow
def test_a_class_that_was_patched_before_this_package_was_imported():
    done = subprocess.run(
        [sys.executable, "-c", PATCHED_FIRST], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


class Composed(Authors):
    """A norm with a submodule."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.scale = nn.Identity()

    def forward(self, x):
        return self.scale(nn.functional.rms_norm(x, self.normalized_shape, self.weight, self.eps))

    def input_norm(self, dtype):
        return None


def test_a_norm_with_an_altered_submodule_does_not_run_again():
    norms, ran = [Composed(C, eps=1e-5) for _ in range(L)], Counter()
    for norm in norms:
        norm.scale.register_forward_hook(lambda *_: ran.update(["part"]))
    h = torch.randn(2, 5, C, requires_grad=True)
    mhc.Stack(C, ConnectionConfig(), L, 2)(h, [torch.sin] * L, norms).sum().backward()
    assert ran["part"] == L


@pytest.mark.parametrize("recompute", [None, 2])
def test_backward_uses_a_replaced_forward_of_the_maps(recompute):
    """A replaced forward of the maps is treated as a hook: its result is used."""
    torch.manual_seed(0)
    stack = mhc.Stack(C, ConnectionConfig(phi_std=0.3), L, recompute)
    branches = [nn.Sequential(nn.Linear(C, C), nn.Tanh(), nn.Linear(C, C)) for _ in range(L)]
    for connection in stack.connections:
        original = connection.maps.forward

        def doubled(*arguments, original=original):
            made = original(*arguments)
            return made._replace(u=2 * made.u, post=0.5 * made.post)

        connection.maps.forward = doubled
    h = torch.randn(2, 5, C)
    stack(h, branches).square().sum().backward()
    torch.manual_seed(0)
    wanted = mhc.Stack(C, ConnectionConfig(phi_std=0.3), L)
    copies = [nn.Sequential(nn.Linear(C, C), nn.Tanh(), nn.Linear(C, C)) for _ in range(L)]
    for connection in wanted.connections:
        connection.maps.register_forward_hook(
            lambda maps, arguments, made: made._replace(u=2 * made.u, post=0.5 * made.post)
        )
    wanted(h, copies).square().sum().backward()
    for a, b in zip(
        [p.grad for branch in branches for p in branch.parameters()],
        [p.grad for branch in copies for p in branch.parameters()],
        strict=True,
    ):
        torch.testing.assert_close(a, b)
