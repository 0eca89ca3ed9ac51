"""Single-pass mHC (DeepSeek-V4.1): every sublayer reads with the pre of the one before it."""

import pytest
import torch

import manifold_hc as mhc
from manifold_hc import functional, interop
from manifold_hc.config import ConnectionConfig
from manifold_hc.errors import ConfigError, ShapeError
from manifold_hc.kernels import backends, unsupported_reason
from tests import oracle

L, C, TOKENS = 3, 7, 4
NUMBERS = {
    "paper": {"numerics": "paper", "iterations": 20, "norm_eps": 1e-20, "hc_eps": 0.0},
    "deepseek_v4": {"numerics": "deepseek_v4", "iterations": 20, "norm_eps": 1e-6, "hc_eps": 1e-6},
}
BACKENDS = [name for name in backends() if not unsupported_reason(name, 4, "cpu", [torch.float32])]


def stack_of(n, sublayers=L, channels=C, **options):
    config = ConnectionConfig(streams=n, single_pass=True, **options)
    stack = mhc.Stack(channels, config, sublayers)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.copy_(0.7 * torch.randn(parameter.shape))
    return stack


def branches_of(weights):
    return [lambda u, w=w: (w * u).sin() for w in weights]


@pytest.mark.parametrize("numerics", NUMBERS)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_an_independent_float64_implementation(backend, n, numerics):
    """Output and all gradients."""
    # DeepSeek's rows sum to 1 - 1e-6 only: what the first res adds while streams are equal is left
    # out, and is of that size.
    exact = 1e-9 if numerics == "paper" else 1e-6
    plain = backend == "reference"
    dtype, tolerance = (torch.float64, exact) if plain else (torch.float32, 1e-4)
    stack = stack_of(n, numerics=numerics, backend=backend).to(dtype)
    h = torch.randn(TOKENS, C, dtype=dtype, requires_grad=True)
    weights = [torch.randn(C, dtype=dtype, requires_grad=True) for _ in range(L)]
    cotangent = torch.randn(TOKENS, C, dtype=dtype)
    out = stack(h, branches_of(weights))
    out.backward(cotangent)

    maps = [connection.maps for connection in stack.connections]
    parameters = [
        [p.detach().double().requires_grad_() for p in (m.phi, m.alpha, m.bias)] for m in maps
    ]
    judge, exact_weights = (
        h.detach().double().requires_grad_(),
        [w.detach().double().requires_grad_() for w in weights],
    )
    wanted = torch.stack(
        [
            oracle.single_pass(
                token, n, parameters, branches_of(exact_weights), **NUMBERS[numerics]
            )
            for token in judge
        ]
    )
    wanted.backward(cotangent.double())

    def close(a, b):
        assert (a.double() - b).abs().max() <= tolerance * (b.abs().max() + 1e-6)

    close(out.detach(), wanted.detach())
    close(h.grad, judge.grad)
    for ours, theirs in zip(weights, exact_weights, strict=True):
        close(ours.grad, theirs.grad)
    for own, (phi, alpha, bias), connection in zip(
        maps, parameters, stack.connections, strict=True
    ):
        # While streams are equal, res has no effect but rounding's, and gets no gradient.
        learns = slice(None, 2 * n) if connection.res_is_idle else slice(None)
        close(own.phi.grad[learns], phi.grad[learns])
        close(own.bias.grad[learns], bias.grad[learns])
        close(own.alpha.grad[:2], alpha.grad[:2])
        if not connection.res_is_idle:
            close(own.alpha.grad, alpha.grad)


@pytest.mark.parametrize("numerics", NUMBERS)
def test_starts_as_the_residual_network(numerics):
    h, branches = torch.randn(5, C).double(), branches_of(torch.randn(24, C).double())
    config = ConnectionConfig(single_pass=True, numerics=numerics)

    def norm(u):
        """A network's, which pre = 1/n rounded to float32 does not get through."""
        return torch.nn.functional.rms_norm(u, (C,), eps=0.0)

    wanted = norm(mhc.Stack(C, ConnectionConfig(kind="residual"), 24)(h, branches, [norm] * 24))
    found = norm(mhc.Stack(C, config, 24).double()(h, branches, [norm] * 24))
    tolerance = 1e-12 if numerics == "paper" else 24e-6
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_differs_from_the_standard_form_once_the_gates_move():
    torch.manual_seed(1)
    late = stack_of(4)
    standard = mhc.Stack(C, ConnectionConfig(), L)
    standard.load_state_dict(late.state_dict())
    h, branches = torch.randn(5, C), branches_of(torch.randn(L, C))
    assert not torch.allclose(late(h, branches), standard(h, branches), rtol=0.05)


def test_every_parameter_but_the_first_res_learns():
    stack = stack_of(4)
    stack(torch.randn(5, C), branches_of(torch.randn(L, C))).square().sum().backward()
    for sublayer, connection in enumerate(stack.connections):
        maps, rows = connection.maps, 24 if sublayer else 8
        assert maps.phi.grad[:rows].abs().sum(-1).all()
        assert maps.bias.grad[:rows].all()
        assert not maps.phi.grad[rows:].any()
        assert not maps.bias.grad[rows:].any()


def test_the_first_sublayer_reads_stream_0():
    stack, seen = stack_of(4), []
    stack.connections[0].maps.register_forward_hook(lambda *a: seen.append(a[2].read_weights))
    stack(torch.randn(5, C), branches_of(torch.randn(L, C)))
    assert torch.equal(seen[0], torch.tensor([1.0, 0, 0, 0]).expand(5, 4))


@pytest.mark.parametrize(
    "options", [{"dynamic": False}, {"disable": ("pre",)}, {"constraint": "permutation"}], ids=str
)
def test_maps_without_a_fused_kernel(options):
    """Streams are written, projected and read one by one; compared with a loop of the functions."""
    torch.manual_seed(2)
    stack = stack_of(4, **options)
    h, branches = torch.randn(5, C), branches_of(torch.randn(L, C))
    x, weights = functional.expand(h, 4), torch.tensor([1.0, 0, 0, 0]).expand(5, 4)
    for connection, branch in zip(stack.connections, branches, strict=True):
        y = branch(functional.read(x, weights))
        weights, post, res = connection.maps(x)[:3]
        x = functional.write(x, y, post, res)
    torch.testing.assert_close(stack(h, branches), functional.collapse(x, weights))


def test_single_pass_has_no_learned_exit():
    assert stack_of(4, numerics="deepseek_v4").exit is None


def test_a_lone_single_pass_connection_raises():
    with pytest.raises(ConfigError, match=r"single_pass reads with the pre .* use mhc\.Stack"):
        mhc.Connection(C, ConnectionConfig(single_pass=True))
    for kind in ("hc", "residual"):
        with pytest.raises(ConfigError, match="single_pass: needs kind=mhc"):
            ConnectionConfig(kind=kind, single_pass=True)


def checkpoint(layers, n=4, head=False):
    """A checkpoint's tensors by DeepSeek's names."""
    rows, tensors = n * (n + 2), {"layers.0.attn_norm.weight": torch.ones(C)}
    for layer in range(layers):
        for name in ("attn", "ffn"):
            prefix = f"layers.{layer}.hc_{name}"
            tensors[f"{prefix}_fn"] = torch.randn(rows, n * C)
            tensors[f"{prefix}_base"] = torch.randn(rows)
            tensors[f"{prefix}_scale"] = torch.rand(3)
    if head:
        tensors["hc_head_fn"] = torch.randn(n, n * C)
        tensors["hc_head_base"], tensors["hc_head_scale"] = torch.randn(n), torch.rand(1)
    return tensors


def test_loads_deepseeks_tensors():
    tensors = checkpoint(2)
    stack = mhc.Stack(C, ConnectionConfig(single_pass=True, numerics="deepseek_v4"), 4)
    interop.load_deepseek(stack, {f"model.{name}": t for name, t in tensors.items()})
    h, branches = torch.randn(TOKENS, C), branches_of(torch.randn(4, C))
    parameters = [
        [tensors[f"layers.{layer}.hc_{name}_{part}"].double() for part in ("fn", "scale", "base")]
        for layer in range(2)
        for name in ("attn", "ffn")
    ]
    wanted = [
        oracle.single_pass(
            token,
            4,
            parameters,
            [lambda u, b=b: b(u.float()).double() for b in branches],
            **NUMBERS["deepseek_v4"],
        )
        for token in h.double()
    ]
    torch.testing.assert_close(
        stack(h, branches), torch.stack(wanted).float(), rtol=1e-4, atol=1e-4
    )


def test_loads_v4_with_its_head_and_transformers_names():
    tensors = checkpoint(1, head=True)
    config = ConnectionConfig(numerics="deepseek_v4")
    stack, other = mhc.Stack(C, config, 2), mhc.Stack(C, config, 2)
    interop.load_deepseek(stack, tensors)
    assert torch.equal(stack.exit.phi, tensors["hc_head_fn"])
    renamed = {
        name.replace("hc_head_", "hc_head.hc_")
        .replace("hc_attn_", "attn_hc.")
        .replace("hc_ffn_", "ffn_hc."): tensor
        for name, tensor in tensors.items()
    }
    interop.load_deepseek(other, renamed)
    for a, b in zip(stack.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_tensors_of_multi_token_prediction_are_ignored():
    config = ConnectionConfig(numerics="deepseek_v4")
    stack, plain = mhc.Stack(C, config, 2), mhc.Stack(C, config, 2)
    tensors = checkpoint(1, head=True)
    interop.load_deepseek(plain, tensors)
    more = {f"mtp.0.{name}": 9 + torch.zeros_like(t) for name, t in tensors.items()}
    more |= {name.replace("mtp.0.", "mtp."): t for name, t in more.items()}
    interop.load_deepseek(stack, tensors | more)
    assert all(map(torch.equal, plain.parameters(), stack.parameters()))


def test_tensors_of_another_model_raise(unchecked):
    single = ConnectionConfig(single_pass=True, numerics="deepseek_v4")
    stack = mhc.Stack(C, single, 4)
    before = [parameter.clone() for parameter in stack.parameters()]
    for tensors, error, message in (
        (checkpoint(1), ConfigError, r"layers\.1\.hc_attn_base \[24\] is missing"),
        (checkpoint(3), ConfigError, r"layers\.2\.hc_attn_base has no place"),
        (checkpoint(2, head=True), ConfigError, "hc_head_base has no place"),
        (checkpoint(2, n=3), ShapeError, r"hc_attn_fn is \[15, 21\], not \[24, 28\]"),
    ):
        with pytest.raises(error, match=message):
            interop.load_deepseek(stack, tensors)
    assert all(map(torch.equal, before, stack.parameters()))
    v4 = mhc.Stack(C, ConnectionConfig(numerics="deepseek_v4"), 4)
    with pytest.raises(ConfigError, match=r"hc_head_base \[4\] is missing"):
        interop.load_deepseek(v4, checkpoint(2))
    with pytest.raises(ConfigError, match='numerics="deepseek_v4"'):
        interop.load_deepseek(mhc.Stack(C, ConnectionConfig(), 4), checkpoint(2))


@pytest.mark.parametrize("sublayers", [[0, 1], [1, 2], [2, 3]], ids=str)
def test_loading_into_a_part_of_a_stack_raises(sublayers):
    config = mhc.ConnectionConfig(numerics="deepseek_v4")
    part = mhc.Stack(8, config, sublayers=4).part(sublayers)
    with pytest.raises(ConfigError, match=r"load_deepseek: the stack must be whole"):
        interop.load_deepseek(part, {})
