"""Block recompute: same bits, less memory, no branch run twice."""

import gc
import math
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import manifold_hc as mhc
from manifold_hc import constraints, functional, recompute
from manifold_hc.config import ConnectionConfig, block_length
from manifold_hc.errors import ConfigError, ShapeError
from manifold_hc.kernels import backends, unsupported_reason

C, L = 24, 5
BACKENDS = [name for name in backends() if not unsupported_reason(name, 4, "cpu", [torch.float32])]
LENGTHS = [1, 3, L]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(C, 3 * C)

    def forward(self, u):
        q, k, v = self.project(u).unflatten(-1, (3, 1, C)).unbind(-3)
        return scaled_dot_product_attention(q.mT, k.mT, v.mT).mT.squeeze(-2)


class Halves(nn.Module):
    """Saves views of its input, one of them not at its beginning."""

    def forward(self, u):
        a, b = u.chunk(2, -1)
        return torch.cat([a.sin() * b, b.sin() * a], -1)


class Network(nn.Module):
    """Attention, a gated branch with dropout, one that saves views, in turn."""

    def __init__(self, recompute=None, norms="given", **options):
        super().__init__()
        torch.manual_seed(1)
        config = ConnectionConfig(**{"phi_std": 0.3, "alpha": 0.5, "iterations": 4} | options)
        self.stack = mhc.Stack(C, config, L, recompute)
        self.norms = nn.ModuleList(nn.RMSNorm(C, eps=1e-5) for _ in range(L))
        kinds = (
            lambda: nn.Sequential(nn.Linear(C, C), nn.SiLU(), nn.Dropout(0.2), nn.Linear(C, C)),
            Attention,
            Halves,
        )
        self.branches = nn.ModuleList(kinds[sublayer % 3]() for sublayer in range(L))
        self.placing = norms

    def forward(self, h):
        if self.placing == "given":
            return self.stack(h, list(self.branches), list(self.norms))
        if self.placing == "inside":
            pairs = zip(self.norms, self.branches, strict=True)
            return self.stack(h, [nn.Sequential(*pair) for pair in pairs])
        return self.stack(h, list(self.branches))


def results(network, h, run=None, passes=1):
    """The output and all gradients."""
    torch.manual_seed(2)
    h = h.clone().requires_grad_()
    for _ in range(passes):
        out = (run or network)(h)
        (out.float() * out.float().sin()).sum().backward()
    return [out, h.grad, *(p.grad for p in network.parameters() if p.grad is not None)]


def assert_same(a, b):
    assert len(a) == len(b)
    assert all(torch.equal(left, right) for left, right in zip(a, b, strict=True))


def input_of(dtype=torch.float32):
    return torch.randn(2, 5, C).to(dtype)


KINDS = {
    "mhc": {},
    "v4": {"numerics": "deepseek_v4"},
    "single": {"single_pass": True},
    "v4.1": {"single_pass": True, "numerics": "deepseek_v4"},
    "static": {"dynamic": False},
    "permutation": {"constraint": "permutation"},
    "pre": {"disable": ("pre", "res")},
    "hc": {"kind": "hc"},
    "residual": {"kind": "residual"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_recompute_gives_the_same_bits(backend, kind, dtype):
    h = input_of(dtype)
    for norms in ("given", "inside"):
        plain = results(Network(None, norms, backend=backend, **KINDS[kind]).to(dtype), h)
        for length in LENGTHS:
            network = Network(length, norms, backend=backend, **KINDS[kind])
            assert_same(results(network.to(dtype), h), plain)


class Mixing(nn.RMSNorm):
    """A norm that declares `input_norm`, and whose result depends on autocast."""

    def forward(self, u):
        return nn.functional.linear(super().forward(u.float()), torch.eye(C).roll(1, 0) + 0.1)

    def input_norm(self, dtype):
        return None


@pytest.mark.parametrize("norm", ["a kernel knows", "autocast decides on"])
@pytest.mark.parametrize("kind", ["mhc", "single"])
def test_recompute_gives_the_same_bits_under_autocast(kind, norm):
    h, found = input_of(), []
    for length in (None, 3):
        for norms in ("inside", "given"):
            network = Network(length, norms, **KINDS[kind])
            if norm == "autocast decides on":
                network.norms = nn.ModuleList(Mixing(C, eps=1e-5) for _ in range(L))
            found.append(results(network, h, torch.autocast("cpu", dtype=torch.bfloat16)(network)))
    assert_same(found[0], found[2])
    assert_same(found[1], found[3])


def test_gradients_add_up_over_several_passes():
    h = input_of()
    assert_same(results(Network(3), h, passes=3), results(Network(), h, passes=3))


def test_interleaved_forward_and_backward_passes():
    found = []
    for length in (None, 3):
        network = Network(length)
        torch.manual_seed(2)
        outs = [network(input_of()) for _ in range(3)]
        for out in (outs[1], outs[0], outs[2]):
            out.square().sum().backward()
        found.append([p.grad for p in network.parameters()])
    assert_same(*found)


def test_backward_twice_with_retain_graph():
    network = Network(3)
    loss = network(input_of()).square().sum()
    parameters = list(network.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    assert_same(first, torch.autograd.grad(loss, parameters))


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_a_compiled_branch():
    h = input_of()
    plain, network = Network(None, "inside"), Network(3, "inside")
    wanted = results(plain.eval(), h)
    network.branches = nn.ModuleList(
        torch.compile(branch, backend="aot_eager") for branch in network.branches
    )
    for found, exact in zip(results(network.eval(), h), wanted, strict=True):
        torch.testing.assert_close(found, exact)


def test_activation_checkpoints_inside_and_around_the_stack():
    h = input_of()
    wanted = results(Network().eval(), h)
    network = Network(3).eval()
    around = results(network, h, lambda h: checkpoint(network, h, use_reentrant=False))
    assert_same(around, wanted)
    network = Network(3).eval()
    branches = [
        lambda u, b=branch: checkpoint(b, u, use_reentrant=False) for branch in network.branches
    ]
    inside = results(network, h, lambda h: network.stack(h, branches, list(network.norms)))
    assert_same(inside, wanted)


class Held:
    """Records through hooks on the maps which streams and inputs are alive."""

    def __init__(self, network):
        self.calls, self.streams, self.inputs, self.normalised = 0, [], [], []
        for connection in network.stack.connections:
            connection.maps.register_forward_hook(self.note)
        for branch in network.branches:
            branch.register_forward_pre_hook(self.note_input)

    def note(self, maps, arguments, reading):
        self.calls += 1
        self.streams.append(StorageWeakRef(reading.x.untyped_storage()))
        self.inputs.append(StorageWeakRef(reading.u.untyped_storage()))

    def note_input(self, branch, arguments):
        self.normalised.append(StorageWeakRef(arguments[0].untyped_storage()))

    def alive(self):
        rows = (self.streams, self.inputs, self.normalised)
        return tuple(sum(not ref.expired() for ref in row) for row in rows)


@pytest.mark.parametrize("kind", ["mhc", "single", "hc", "pre"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_held_after_the_forward_pass(backend, kind):
    """The first streams of every block, once; no input of a branch, no normalised one."""
    for length in (1, 2, 3, 5):
        network = Network(length, backend=backend, **KINDS[kind])
        held = Held(network)
        out = network(input_of().requires_grad_())
        assert held.alive() == (math.ceil(L / length), 0, 0)
        del out
        assert held.alive() == (0, 0, 0)
    network = Network(None, "inside", backend=backend, **KINDS[kind])
    held = Held(network)
    out = network(input_of().requires_grad_())
    assert out.requires_grad
    assert held.alive()[:2] == (L, L)


def test_a_norm_inside_a_branch_keeps_its_own_result():
    network = Network(3, "inside")
    seen = []
    network.branches[0].register_forward_pre_hook(
        lambda _, inputs: seen.append(StorageWeakRef(inputs[0].untyped_storage()))
    )
    out = network(input_of())
    assert not seen[0].expired()
    del out
    assert seen[0].expired()


def test_hooks_and_branches_run_once():
    """A norm with a hook does not run again either."""
    network = Network(3)
    held, ran = Held(network), []
    for watched in (*network.branches, *network.norms):
        watched.register_forward_hook(lambda *_: ran.append(0))
    network(input_of()).square().sum().backward()
    assert (held.calls, len(ran)) == (L, 2 * L)


def test_backward_runs_no_sinkhorn(monkeypatch):
    ran = []
    iterate = constraints.CONSTRAINTS["sinkhorn"].build
    counted = replace(
        constraints.CONSTRAINTS["sinkhorn"], build=lambda *a: (ran.append(0), iterate(*a))[1]
    )
    monkeypatch.setitem(constraints.CONSTRAINTS, "sinkhorn", counted)
    out = Network(3, backend="reference")(input_of())
    assert len(ran) == L
    out.square().sum().backward()
    assert len(ran) == L


class Ran(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no CPU backend here")
def test_a_block_is_rebuilt_by_one_operator():
    out = Network(3, backend="cpu")(input_of())
    with Ran() as ran:
        out.square().sum().backward()
    own = [name for name in ran.names if name.startswith("cpu_")]
    assert own.count("cpu_rebuild") == math.ceil(L / 3)
    assert all(name.endswith(("_backward", "_rebuild")) for name in own)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no CPU backend here")
def test_blocks_are_rebuilt_in_reused_memory(monkeypatch):
    from manifold_hc.kernels.cpu import memory

    stack = mhc.Stack(256, ConnectionConfig(backend="cpu"), 12, recompute=3)
    h = torch.randn(2048, 256, requires_grad=True)
    first = stack(h, [torch.sin] * 12)
    first.sum().backward()
    second, mapped = stack(h, [torch.sin] * 12), []
    fresh = memory.mmap.mmap
    monkeypatch.setattr(memory.mmap, "mmap", lambda *a, **k: (mapped.append(a), fresh(*a, **k))[1])
    second.sum().backward()
    assert not mapped


def test_one_block_is_held_at_a_time(monkeypatch):
    from manifold_hc import functional

    rebuild, made = functional.rebuild, []

    def watched(*arguments, **options):
        assert all(storage.expired() for storage in made)
        streams, inputs = rebuild(*arguments, **options)
        made.extend(StorageWeakRef(t.untyped_storage()) for t in (*streams, *inputs))
        return streams, inputs

    monkeypatch.setattr(functional, "rebuild", watched)
    results(Network(2), input_of())
    assert len(made) == (1 + 2) + (1 + 2) + (0 + 1)


def test_a_hook_that_replaces_the_input():
    """Rebuilding the input from the coefficients would give another gradient."""

    def doubled(maps, arguments, reading):
        return reading._replace(u=2 * reading.u)

    found = []
    for length in (None, 3):
        network = Network(length, "none")
        for connection in network.stack.connections:
            connection.maps.register_forward_hook(doubled)
        found.append(results(network, input_of()))
    assert_same(*found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changing", [0, 1, 4, "all"])
def test_a_branch_that_changes_its_input(kind, changing):
    """With a residual connection the input is a view of the streams."""
    found = []
    for length in (None, 3):
        torch.manual_seed(3)
        stack = mhc.Stack(C, ConnectionConfig(phi_std=0.3, **KINDS[kind]), L, length)
        weights = [torch.randn(C, C, requires_grad=True) for _ in range(L)]

        def branch(u, sublayer, weights=weights):
            if changing in (sublayer, "all"):
                u.mul_(0.5)
            return (u @ weights[sublayer]).tanh()

        h = torch.randn(5, C, requires_grad=True)
        stack(1 * h, [partial(branch, sublayer=k) for k in range(L)]).square().sum().backward()
        parameters = [*stack.parameters(), *weights]
        found.append([h.grad, *(p.grad for p in parameters if p.grad is not None)])
    assert_same(*found)


def test_a_branch_that_returns_its_input():
    found = []
    for length in (None, 3):
        torch.manual_seed(3)
        stack = mhc.Stack(C, ConnectionConfig(phi_std=0.3), L, length)
        h = torch.randn(5, C, requires_grad=True)
        stack(h, [nn.Identity()] * L).square().sum().backward()
        found.append([h.grad, *(p.grad for p in stack.parameters() if p.grad is not None)])
    assert_same(*found)


def test_memory_does_not_grow_over_steps():
    network = Network(3)

    def step():
        network(input_of()).square().sum().backward()
        return sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())

    counts = [step() for _ in range(6)]
    assert len(set(counts[1:])) == 1


def test_no_gradient_no_recompute_context(monkeypatch):
    def refused(*_):
        raise AssertionError("recorded")

    monkeypatch.setattr(recompute, "run_with_recompute", refused)
    network = Network(3).eval()
    with torch.no_grad():
        network(input_of())
    with pytest.raises(AssertionError, match="recorded"):
        network(input_of())


def test_an_exception_leaves_no_hooks_behind():
    stack = mhc.Stack(C, ConnectionConfig(), 2, recompute=1)

    def broken(u):
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        stack(torch.randn(3, C), [torch.sin, broken])
    a = torch.randn(3, requires_grad=True)
    assert a.sin().grad_fn._saved_self is a


def test_hooks_on_maps_see_the_same_tensors():
    """Compared between runs with and without recompute, with gradients enabled."""
    seen = {None: [], 3: []}
    for length, readings in seen.items():
        network = Network(length)
        for connection in network.stack.connections:
            connection.maps.register_forward_hook(lambda *a, to=readings: to.extend(a[2][:5]))
        network(input_of()).sum().backward()
    assert_same(*seen.values())


def test_auto_block_length_minimises_equation_20():
    assert block_length("auto", 60, 4) == 6
    for n in (1, 2, 4, 8):
        for sublayers in (1, 2, 5, 24, 60, 61):
            costs = [
                n * math.ceil(sublayers / length) + (n + 2) * length
                for length in range(1, sublayers + 1)
            ]
            chosen = block_length("auto", sublayers, n)
            assert costs[chosen - 1] == min(costs)
            assert abs(chosen - math.sqrt(n * sublayers / (n + 2))) < 2
    assert block_length(None, 60, 4) is None


@pytest.mark.parametrize("recompute", [0, -1, L + 1, True, 2.5, "always"])
def test_invalid_block_lengths_raise(recompute, unchecked):
    with pytest.raises(ConfigError, match=r"recompute: .* but (has|is)"):
        mhc.Stack(C, ConnectionConfig(), L, recompute)


def test_a_branch_that_changes_the_shape_raises():
    stack = mhc.Stack(C, ConnectionConfig(), 2, recompute=2)
    with pytest.raises(ShapeError, match="the branch must return"):
        stack(torch.randn(3, C), [torch.sin, lambda u: u[:, :-1]])


def test_one_norm_per_branch():
    stack = mhc.Stack(C, ConnectionConfig(), 2)
    with pytest.raises(ShapeError, match="norms must be 2, one per sublayer, but are 1"):
        stack(torch.randn(3, C), [torch.sin] * 2, [nn.RMSNorm(C)])


def steps(stack, branch, between=lambda: None):
    """Gradients of a small stack of one branch, `between` called before the backward pass."""
    h = torch.linspace(-1, 1, 5 * C).view(5, C).requires_grad_()
    out = stack(h, [branch] * L)
    between()
    out.square().sum().backward()
    return [h.grad, *(p.grad for p in stack.parameters() if p.grad is not None)]


def stack_of(length, **options):
    torch.manual_seed(3)
    return mhc.Stack(C, ConnectionConfig(**{"phi_std": 0.3, **options}), L, length)


@pytest.mark.parametrize("length", [None, 2])
def test_a_change_in_place_after_saving_raises(length):
    def late(u):
        y = u * u.sin()
        with torch.no_grad():
            u.add_(1)
        return y

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        steps(stack_of(length), late)
    given = []

    def kept(u):
        given.append(u.sin())
        return given[-1]

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        steps(stack_of(length), kept, lambda: given[1].detach().add_(1))
    stack = stack_of(length)

    def moved():
        with torch.no_grad():
            stack.connections[2].maps.phi.mul_(2)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        steps(stack, torch.sin, moved)


def test_a_changed_residual_branch_output_raises_in_backward():
    given = []

    def kept(u):
        given.append(u.sin())
        return given[-1]

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        steps(stack_of(3, kind="residual"), kept, lambda: given[0].detach().add_(1))


@pytest.mark.parametrize("kind", ["mhc", "single", "hc", "residual"])
@pytest.mark.parametrize("part", ["pre", "post", "res", "x", "u"])
def test_hooks_that_replace_any_field_of_a_reading(kind, part):
    def changed(maps, arguments, reading):
        return reading._replace(**{part: 1.5 * getattr(reading, part)})

    found = []
    for length in (None, L):
        stack = stack_of(length, **KINDS[kind])
        stack.connections[2].maps.register_forward_hook(changed)
        found.append(steps(stack, torch.sin))
    assert_same(*found)


@pytest.mark.parametrize("kind", ["mhc", "single", "hc", "residual"])
@pytest.mark.parametrize("part", ["y", "post", "res", "x"])
@pytest.mark.parametrize("registered", ["on the maps", "on all modules"])
def test_hooks_that_replace_the_input_of_the_maps(kind, part, registered):
    def changed(module, arguments):
        if module is not stack.connections[2].maps:
            return None
        source, *rest = arguments
        if isinstance(source, torch.Tensor):
            return 1.5 * source, *rest
        if part == "y":
            return source._replace(y=1.5 * source.y), *rest
        reading = source.reading._replace(**{part: 1.5 * getattr(source.reading, part)})
        return source._replace(reading=reading), *rest

    found = []
    for length in (None, L):
        stack = stack_of(length, **KINDS[kind])
        if registered == "on all modules":
            handle = nn.modules.module.register_module_forward_pre_hook(changed)
        else:
            handle = stack.connections[2].maps.register_forward_pre_hook(changed)
        found.append(steps(stack, torch.sin))
        handle.remove()
    assert_same(*found)


def on_the_output(connection, ran):
    def hook(module, arguments, x):
        ran.append(x.shape[-2:])
        return 1.5 * x

    connection.register_forward_hook(hook)


def on_the_input(connection, ran):
    def hook(module, arguments):
        x, branch = arguments
        ran.append(x.shape[-2:])
        return x / 1.5, branch

    connection.register_forward_pre_hook(hook)


def by_another_forward(connection, ran):
    forward = connection.forward

    def doubled(x, branch):
        ran.append(x.shape[-2:])
        return 2 * forward(x, branch)

    connection.forward = doubled


WAYS = (on_the_output, on_the_input, by_another_forward)


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("kind", ["mhc", "hc", "residual"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_an_altered_connection_gets_written_streams(kind, way, norms):
    """The same as separate connections, with every block length, and once a pass."""
    found = []
    for length in (None, 1, 2, L, "separate"):
        torch.manual_seed(0)
        stack = stack_of(None if length == "separate" else length, **KINDS[kind])
        norm = nn.RMSNorm(stack.connections[0].channels, eps=1e-5)
        ran = []
        way(stack.connections[2], ran)
        if length != "separate":
            run = partial(stack, norms=[norm] * L) if norms else stack
        else:

            def run(h, branches, stack=stack, norm=norm):
                x = functional.expand(h, stack.config.n)
                for connection, branch in zip(stack.connections, branches, strict=True):
                    x = connection(x, (lambda u, b=branch: b(norm(u))) if norms else branch)
                return stack.collapse(x)

        h = torch.randn(2, 5, norm.weight.shape[0], requires_grad=True)
        out = run(h, [torch.sin] * L)
        leaves = [h, *(p for p in stack.parameters() if p.requires_grad)]
        gradients = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)
        assert ran == [torch.Size([stack.config.n, h.shape[-1]])]
        found.append([out, *gradients])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert (a is None) == (b is None)
            assert a is None or (a - b).norm() <= 1e-5 * a.norm()


def test_an_altered_connection_of_a_single_pass_is_refused():
    stack = stack_of(None, **KINDS["single"])
    stack.connections[1].register_forward_hook(lambda *_: None)
    with pytest.raises(ConfigError, match=r"connection 1 has hooks .* put hooks on its maps"):
        stack(torch.randn(5, stack.connections[0].channels), [torch.sin] * L)


class Conditioned(nn.Module):
    """A norm that depends on more than its input and its parameters."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, u):
        return self.scale.cos() * u


@pytest.mark.parametrize("norm", ["dropout", "conditioned", "batch", "mode"])
@pytest.mark.parametrize("kind", ["mhc", "hc", "residual"])
def test_impure_norms_do_not_run_again(kind, norm):
    """Norms with random numbers, foreign tensors, buffers or a changing mode."""
    found = []
    for length in (None, 3):
        network = Network(length, **KINDS[kind])
        scale = torch.full((C,), 0.3, requires_grad=True)
        make = {
            "dropout": lambda: nn.Sequential(nn.LayerNorm(C), nn.Dropout(0.5)),
            "conditioned": lambda scale=scale: Conditioned(scale),
            "batch": lambda: nn.BatchNorm1d(5),
            "mode": lambda: nn.Sequential(nn.LayerNorm(C), nn.Dropout(0.5)),
        }[norm]
        network.norms = nn.ModuleList(make() for _ in range(L))

        def run(h, network=network):
            out = network(h)
            if norm == "mode":
                network.eval()
            return out

        found.append([*results(network, input_of(), run), *network.buffers()])
        if scale.grad is not None:
            found[-1].append(scale.grad)
    assert len(found[0]) > 10
    assert_same(*found)


@pytest.mark.parametrize("length", [None, 3])
@pytest.mark.parametrize("kind", ["mhc", "hc"])
def test_every_hook_of_a_norm_fires_once(kind, length):
    ran, network = Counter(), Network(length, **KINDS[kind])
    for norm in network.norms:
        norm.register_full_backward_hook(lambda *_: ran.update(["backward"]))
    network(input_of().requires_grad_()).sum().backward()
    assert ran == {"backward": L}
    network = Network(length, **KINDS[kind])
    for norm in network.norms:
        norm.register_full_backward_pre_hook(lambda *_: ran.update(["before backward"]))
    network(input_of().requires_grad_()).sum().backward()
    assert ran["before backward"] == L
    everywhere = nn.modules.module.register_module_forward_hook(
        lambda module, *_: ran.update([type(module)])
    )
    network = Network(length, **KINDS[kind])
    network(input_of().requires_grad_()).sum().backward()
    everywhere.remove()
    assert ran[nn.RMSNorm] == L


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # torch, of other modules
@pytest.mark.parametrize("register", ["full_backward_hook", "full_backward_pre_hook"])
@pytest.mark.parametrize("length", [None, 2])
def test_backward_hooks_on_all_modules_see_every_norm(register, length):
    ran, network = Counter(), Network(length)
    everywhere = getattr(nn.modules.module, f"register_module_{register}")(
        lambda module, *_: ran.update([type(module)])
    )
    try:
        network(input_of().requires_grad_()).sum().backward()
    finally:
        everywhere.remove()
    assert ran[nn.RMSNorm] == L


def test_on_the_meta_device():
    network = Network(3).to("meta")
    h = torch.empty(2, 5, C, device="meta", requires_grad=True)
    network(h).sum().backward()
    assert h.grad.shape == h.shape


@pytest.mark.parametrize("kind", ["mhc", "residual"])
def test_norm_parameters_of_functional_call(kind):
    """In backward the module has its own parameters again."""
    found = []
    for length in (None, 3):
        network = Network(length, **KINDS[kind])
        network.norms = nn.ModuleList(nn.LayerNorm(C) for _ in range(L))
        names = [name for name, _ in network.named_parameters() if name.startswith("norms")]
        lent = {name: torch.full((C,), 0.3, requires_grad=True) for name in names}
        torch.manual_seed(2)
        out = torch.func.functional_call(network, lent, (input_of(),))
        found.append(torch.autograd.grad(out.square().sum(), list(lent.values())))
    assert_same(*found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["mhc", "hc", "residual"])
def test_branch_dtypes_without_a_kernel(kind, dtype):
    found = [
        steps(stack_of(length, **KINDS[kind]), lambda u: u.to(dtype).sin()) for length in (None, 3)
    ]
    assert_same(*found)


@pytest.mark.parametrize("kind", ["mhc", "single", "hc", "residual"])
def test_float64(kind):
    """With norms that have no parameters."""
    found = []
    for length in (None, 3):
        network = Network(length, **KINDS[kind]).double()
        network.norms = nn.ModuleList(nn.LayerNorm(C, elementwise_affine=False) for _ in range(L))
        found.append(results(network, input_of(torch.float64)))
    assert_same(*found)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["mhc", "hc", "pre"])
def test_activation_checkpoint_around_a_connection(backend, kind):
    connection = mhc.Connection(C, ConnectionConfig(backend=backend, phi_std=0.3, **KINDS[kind]))
    x, found = torch.randn(3, 4, C), []
    for run in (connection, lambda *a: checkpoint(connection, *a, use_reentrant=False)):
        leaf = x.clone().requires_grad_()
        run(leaf, torch.sin).square().sum().backward()
        found.append([leaf.grad])
    assert_same(*found)
