import math

import pytest
import torch
from torch import nn

import manifold_hc as mhc
from manifold_hc import functional
from manifold_hc.config import ConnectionConfig
from manifold_hc.constraints import CONSTRAINTS
from manifold_hc.errors import ConfigError, ShapeError
from manifold_hc.maps import LearnedExit

L, C = 24, 32


def network(config, dtype=torch.float64, embedding_std=0.006):
    """The last hidden state of a random pre-norm network, after a final norm with epsilon 0."""
    torch.manual_seed(0)
    branches = nn.ModuleList(
        nn.Sequential(nn.RMSNorm(C, eps=1e-20), nn.Linear(C, 2 * C), nn.SiLU(), nn.Linear(2 * C, C))
        for _ in range(L)
    ).to(dtype)
    h = embedding_std * torch.randn(2, 7, C, dtype=dtype)
    stack = mhc.Stack(C, config, L).to(dtype)
    return nn.functional.rms_norm(stack(h, list(branches)), (C,), eps=0.0), stack, branches, h


def distance(a, b):
    return float(((a - b).abs().max() / b.abs().max()).detach())


@pytest.fixture(scope="module")
def residual():
    return network(ConnectionConfig(kind="residual"))[0]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("kind", ["hc", "mhc"])
@pytest.mark.parametrize("dynamic", [True, False])
def test_starts_as_the_residual_network(residual, kind, n, dynamic):
    config = ConnectionConfig(kind=kind, streams=n, dynamic=dynamic)
    assert distance(network(config)[0], residual) < 1e-12


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_starts_as_the_residual_network_under_every_constraint(residual, constraint):
    assert distance(network(ConnectionConfig(constraint=constraint))[0], residual) < 1e-12


def test_deepseeks_numerics_start_close_to_the_residual_network(residual):
    n1, n4 = (
        distance(network(ConnectionConfig(numerics="deepseek_v4", streams=n))[0], residual)
        for n in (1, 4)
    )
    assert 1e-7 < n1 < L * 1e-6
    assert 1e-7 < n4 < L * 1e-6


def walk(config):
    """Streams after the last sublayer, and the input of every branch."""
    _, stack, branches, h = network(config)
    x, reads = functional.expand(h, config.n), []

    def watched(branch):
        def run(u):
            reads.append(u)
            return branch(u)

        return run

    with torch.no_grad():
        for connection, branch in zip(stack.connections, branches, strict=True):
            x = connection(x, watched(branch))
    return x, reads


def test_streams_differ_after_the_first_forward_pass():
    """The outermost pair by 5 % at any n; its neighbours share that range of write weights."""
    for n in (2, 3, 4, 8):
        x, _ = walk(ConnectionConfig(streams=n))
        pairs = {
            (a, b): float((x[..., a, :] - x[..., b, :]).norm() / x[..., b, :].norm())
            for a in range(n)
            for b in range(n)
            if a != b
        }
        assert pairs[0, n - 1] > 0.05
        assert min(pairs.values()) > 0.1 / n


def test_hc_sublayers_read_different_streams():
    """At step 0 sublayer l reads stream l mod n alone."""
    for index in range(6):
        maps = mhc.Connection(C, ConnectionConfig(kind="hc", streams=4), index).maps
        pre, post, res = maps(torch.randn(2, 4, C))[:3]
        assert pre[0].tolist() == [float(stream == index % 4) for stream in range(4)]
        assert torch.equal(post, torch.ones(2, 4))
        assert torch.equal(res, torch.eye(4).expand(2, 4, 4))


def test_streams_stay_different_in_training():
    """Streams with equal parameters get equal gradients and stay equal."""
    _, stack, branches, h = network(ConnectionConfig(), embedding_std=1.0)
    optimizer = torch.optim.SGD(stack.parameters(), lr=1.0)
    direction = torch.randn(2, 7, C)
    for _ in range(3):
        (stack(h, list(branches)) * direction).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for connection in stack.connections:
        rows = connection.maps.phi[4:8].detach()
        for a in range(4):
            for b in range(a):
                assert (rows[a] - rows[b]).norm() > 1e-3 * rows[a].norm() > 0


def test_a_connection_is_coefficients_read_branch_write():
    connection = mhc.Connection(8, ConnectionConfig(streams=3, phi_std=0.3), sublayer=2)
    x = torch.randn(2, 5, 3, 8)
    pre, post, res, u, *_ = connection.maps(x)
    assert torch.equal(u, functional.read(x, pre))
    wanted = functional.write(x, torch.sin(functional.read(x, pre)), post, res)
    assert torch.equal(connection(x, torch.sin), wanted)


def test_the_default_is_the_papers_connection():
    config = ConnectionConfig()
    assert (config.kind, config.streams, config.iterations) == ("mhc", 4, 20)
    assert (config.numerics, config.constraint, config.backend) == ("paper", "sinkhorn", "auto")


def test_residual_is_an_addition():
    connection = mhc.Connection(8, ConnectionConfig(kind="residual"))
    x = torch.randn(2, 1, 8)
    assert torch.equal(connection(x, torch.sin), x + x.sin())
    assert list(connection.parameters()) == []
    assert connection(x.bfloat16(), lambda u: u.float()).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["hc", "mhc"])
def test_parameter_count_is_the_documented_one(kind):
    connection = mhc.Connection(1280, ConnectionConfig(kind=kind))
    count = sum(p.numel() for p in connection.parameters())
    assert count == (96 * 1280 + 27 if kind == "mhc" else 6 * 1280 + 3 + 24)


@pytest.mark.parametrize("kind", ["hc", "mhc"])
@pytest.mark.parametrize("part", ["pre", "post", "res"])
def test_disabled_parts_are_constants(kind, part):
    maps = mhc.Connection(8, ConnectionConfig(kind=kind, disable=(part,), phi_std=1.0), 1).maps
    full = mhc.Connection(8, ConnectionConfig(kind=kind, phi_std=1.0), 1).maps
    for module in (maps, full):
        nn.init.normal_(module.bias)
    x = torch.randn(5, 4, 8)
    constants = {
        "pre": torch.full((5, 4), 0.25),
        "post": torch.ones(5, 4),
        "res": torch.eye(4).expand(5, 4, 4),
    }
    for name in ("pre", "post", "res"):
        off, on = getattr(maps(x), name), getattr(full(x), name)
        assert torch.equal(off, constants[name]) == (name == part)
        assert not torch.equal(on, constants[name])


@pytest.mark.parametrize("disable", [("post",), ("post", "pre")])
def test_mhc_without_post_stays_the_residual_network_in_training(disable):
    """Streams stay copies of one another, and rows of `res` and pre's mean sum to 1.

    With pre learned the read is scaled, so its bias stays; `res` alone may be anything.
    """
    config = ConnectionConfig(disable=disable)
    _, stack, branches, h = network(config, embedding_std=1.0)
    wanted, *_ = network(ConnectionConfig(kind="residual"), embedding_std=1.0)
    for connection in stack.connections:
        bias = connection.maps.bias
        with torch.no_grad():
            bias[8:] = torch.randn(16, dtype=bias.dtype)
    got = nn.functional.rms_norm(stack(h, list(branches)), (C,), eps=0.0)
    assert distance(got, wanted) < 1e-12


class TestPrecision:
    """Coefficient parameters never fall below float32."""

    @pytest.mark.parametrize("convert", [nn.Module.bfloat16, nn.Module.half])
    @pytest.mark.parametrize("numerics", ["paper", "deepseek_v4"])
    @pytest.mark.parametrize("kind", ["hc", "mhc"])
    def test_half_precision_conversions_leave_parameters_in_float32(self, convert, kind, numerics):
        stack = mhc.Stack(8, ConnectionConfig(kind=kind, numerics=numerics), 2)
        model = nn.ModuleDict({"stack": stack, "head": nn.Linear(8, 8)})
        before = {name: p.clone() for name, p in stack.named_parameters()}
        convert(model)
        assert model["head"].weight.dtype in (torch.bfloat16, torch.float16)
        for name, parameter in stack.named_parameters():
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, before[name])

    def test_to_and_type_leave_float32_and_double_converts(self):
        stack = mhc.Stack(8, ConnectionConfig(), 1)
        for convert in (
            lambda: stack.to(torch.bfloat16),
            lambda: stack.to("cpu", torch.float16),
            lambda: stack.type(torch.bfloat16),
        ):
            convert()
            assert {p.dtype for p in stack.parameters()} == {torch.float32}
        stack.double()
        assert {p.dtype for p in stack.parameters()} == {torch.float64}
        stack.bfloat16()
        assert {p.dtype for p in stack.parameters()} == {torch.float32}

    @pytest.mark.parametrize("assign", [True, False])
    def test_a_checkpoint_in_bfloat16_is_widened(self, assign):
        model = nn.ModuleDict({"stack": mhc.Stack(8, ConnectionConfig(phi_std=0.1), 2)})
        half = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
        model.load_state_dict(half, assign=assign)
        for name, parameter in model.named_parameters():
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, half[name].float())
        assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}

    def test_parameters_follow_the_device(self):
        stack = mhc.Stack(8, ConnectionConfig(), 1).to("meta", torch.bfloat16)
        assert {(p.device.type, p.dtype) for p in stack.parameters()} == {("meta", torch.float32)}

    def test_a_low_default_dtype_leaves_parameters_in_float32(self):
        torch.set_default_dtype(torch.bfloat16)
        try:
            stack = mhc.Stack(8, ConnectionConfig(numerics="deepseek_v4"), 1)
        finally:
            torch.set_default_dtype(torch.float32)
        assert {p.dtype for p in stack.parameters()} == {torch.float32}

    @pytest.mark.parametrize("kind", ["residual", "hc", "mhc"])
    def test_bfloat16_streams_run_and_keep_their_dtype(self, kind):
        stack = mhc.Stack(8, ConnectionConfig(kind=kind), 4).bfloat16()
        h = torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True)
        out = stack(h, [torch.sin] * 4)
        assert out.dtype == torch.bfloat16
        out.sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in stack.parameters())

    def test_autocast_gives_the_same_coefficients(self):
        maps = mhc.Connection(8, ConnectionConfig(phi_std=0.5)).maps
        x = torch.randn(5, 4, 8)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = maps(x)
        for a, b in zip(inside[:4], maps(x)[:4], strict=True):
            assert torch.equal(a, b)


class TestStack:
    def test_exits(self):
        x = torch.randn(5, 4, 8)
        hc, paper, v4 = (
            mhc.Stack(8, config, 1)
            for config in (
                ConnectionConfig(kind="hc"),
                ConnectionConfig(),
                ConnectionConfig(numerics="deepseek_v4"),
            )
        )
        torch.testing.assert_close(hc.collapse(x), x.sum(1))
        torch.testing.assert_close(paper.collapse(x), x.mean(1))
        assert isinstance(v4.exit, LearnedExit)
        torch.testing.assert_close(v4.collapse(x), x.mean(1) + 1e-6 * x.sum(1))

    def test_state_dict_round_trip(self):
        config = ConnectionConfig(numerics="deepseek_v4", phi_std=0.2)
        stack, other = mhc.Stack(8, config, 3), mhc.Stack(8, config, 3)
        other.load_state_dict(stack.state_dict())
        h = torch.randn(2, 8)
        assert torch.equal(stack(h, [torch.sin] * 3), other(h, [torch.sin] * 3))

    def test_branches_must_match_the_sublayers(self):
        with pytest.raises(ShapeError, match=r"branches must be 3, .* but are 2"):
            mhc.Stack(8, ConnectionConfig(), 3)(torch.randn(2, 8), [torch.sin] * 2)

    @pytest.mark.usefixtures("unchecked")
    def test_branches_that_are_not_a_sequence_raise(self):
        stack, h = mhc.Stack(8, ConnectionConfig(), 3), torch.randn(2, 8)
        with pytest.raises(ShapeError, match=r"branches must be a list of 3, .* but is generator"):
            stack(h, (torch.sin for _ in range(3)))
        with pytest.raises(ShapeError, match=r"norms must be a list of 3, .* but is generator"):
            stack(h, [torch.sin] * 3, (torch.sin for _ in range(3)))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "hcc"}, "kind: must be residual, hc or mhc"),
        ({"streams": 0}, "streams: must be at least 1 but is 0"),
        ({"iterations": 0}, "iterations: must be at least 1"),
        ({"iterations": "20"}, "iterations: must be an integer but is '20'"),
        ({"iterations": None}, "iterations: must be an integer but is None"),
        ({"norm_eps": "1"}, "norm_eps: must be a number but is '1'"),
        ({"norm_eps": 1e39}, r"norm_eps: must be finite in float32 .* but is 1e\+39"),
        ({"alpha": "1"}, "alpha: must be finite in float32 but is '1'"),
        ({"alpha": 1e39}, r"alpha: must be finite in float32 but is 1e\+39"),
        ({"dynamic": "no"}, "dynamic: must be True or False but is 'no'"),
        ({"single_pass": 1}, "single_pass: must be True, False or None but is 1"),
        ({"kind": "hc", "single_pass": True}, "single_pass: needs kind=mhc but kind is hc"),
        ({"exit": "first"}, "exit: must be one of mean, sum, learned, pre but is 'first'"),
        ({"exit": "pre"}, "exit: pre needs single_pass=True"),
        ({"exit": "learned", "kind": "residual"}, "exit: learned needs streams"),
        ({"constraint": "orthogonal"}, "constraint: must be one of"),
        ({"constraint": "kronecker", "streams": 3}, "power of two"),
        ({"constraint": "permutation", "streams": 6}, "n <= 5"),
        ({"numerics": "v3"}, "numerics: must be one of"),
        ({"hc_eps": 1e-6}, "hc_eps"),
        ({"disable": ("comb",)}, "takes any of pre, post, res but has 'comb'"),
        ({"phi_std": -1.0}, "phi_std"),
        ({"phi_std": math.inf}, "phi_std"),
        ({"norm_eps": math.nan}, "norm_eps"),
        ({"alpha": math.nan}, "alpha: must be finite"),
        ({"backend": "fast"}, "backend: must be one of auto, triton, cpu, reference but is 'fast'"),
    ],
)
def test_configurations_that_cannot_be_built(options, message):
    with pytest.raises(ConfigError, match=message):
        ConnectionConfig(**options)


@pytest.mark.parametrize(
    ("options", "exit_rule", "single_pass"),
    [
        ({}, "mean", False),
        ({"kind": "residual"}, "mean", False),
        ({"kind": "hc"}, "sum", False),
        ({"kind": "hc", "numerics": "deepseek_v41"}, "sum", False),
        ({"numerics": "deepseek_v4"}, "learned", False),
        ({"numerics": "deepseek_v4", "single_pass": True}, "pre", True),
        ({"numerics": "deepseek_v41"}, "pre", True),
        ({"numerics": "deepseek_v41", "single_pass": False}, "learned", False),
        ({"numerics": "deepseek_v41", "exit": "mean"}, "mean", True),
        ({"numerics": "glm5"}, "mean", False),
        ({"numerics": "glm5", "exit": "learned"}, "learned", False),
        ({"exit": "sum"}, "sum", False),
    ],
)
def test_exit_and_passes_are_the_presets_unless_given(options, exit_rule, single_pass):
    config = ConnectionConfig(**options)
    assert (config.exit_rule, config.is_single_pass) == (exit_rule, single_pass)


@pytest.mark.parametrize("kind", ["hc", "mhc"])
def test_every_exit_reduces_the_streams_as_it_says(kind):
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    stacks = {
        exit_: mhc.Stack(8, ConnectionConfig(kind=kind, exit=exit_)).double()
        for exit_ in ("mean", "sum", "learned")
    }
    torch.testing.assert_close(stacks["mean"].collapse(x), x.mean(-2))
    torch.testing.assert_close(stacks["sum"].collapse(x), x.sum(-2))
    # It starts as the mean: phi is 0 and sigmoid(-ln 3) is 1/4.
    torch.testing.assert_close(stacks["learned"].collapse(x), x.mean(-2))
    stacks["learned"].exit.bias.data = torch.tensor([0.0, 1.0, -1.0, 2.0], dtype=torch.float64)
    weights = stacks["learned"].exit.bias.sigmoid()
    torch.testing.assert_close(stacks["learned"].collapse(x), (weights[:, None] * x).sum(-2))


def test_glm5_is_deepseek_v4_with_its_own_norm_epsilon():
    x = 1e-3 * torch.randn(3, 4, 8, dtype=torch.float64)
    phi, alpha, bias = (
        torch.randn(24, 32).double(),
        torch.ones(3).double(),
        torch.zeros(24).double(),
    )
    glm5 = functional.coefficients(x, phi, alpha, bias, numerics="glm5")
    v4 = functional.coefficients(x, phi, alpha, bias, numerics="deepseek_v4", norm_eps=1e-5)
    other = functional.coefficients(x, phi, alpha, bias, numerics="deepseek_v4")
    for ours, wanted, differs in zip(glm5, v4, other, strict=True):
        assert torch.equal(ours, wanted)
        assert not torch.allclose(ours, differs, rtol=1e-3)


@pytest.mark.usefixtures("unchecked")
def test_misuse_raises_with_advice():
    with pytest.raises(ShapeError, match=r"x must be \[..., 4, 8\] .* expand\(\)"):
        mhc.Connection(8)(torch.randn(2, 8), torch.sin)
    with pytest.raises(ShapeError, match=r"x must be \[..., 1, 8\]"):
        mhc.Connection(8, ConnectionConfig(kind="residual"))(torch.randn(2, 4, 8), torch.sin)
    with pytest.raises(ShapeError, match="a branch must keep the shape"):
        mhc.Connection(8)(torch.randn(2, 4, 8), lambda u: u[..., :4])
    residual = mhc.Connection(8, ConnectionConfig(kind="residual"))
    with pytest.raises(ShapeError, match="a branch must keep the shape"):
        residual(torch.randn(2, 1, 8), lambda u: u[..., :1])
    with pytest.raises(ConfigError, match="channels must be at least 1"):
        mhc.Connection(0)
    with pytest.raises(ConfigError, match="sublayers must be at least 1"):
        mhc.Stack(8, ConnectionConfig(), 0)


@pytest.mark.parametrize(
    ("kind", "n", "said"),
    [
        ("mhc", 2, r"x has 2 streams and the connection 4; give expand\(\) and .* the same n"),
        ("residual", 4, r"x has 4 streams and the connection 1, as residual always has; give"),
    ],
)
def test_another_number_of_streams_raises_with_advice(kind, n, said):
    connection = mhc.Connection(8, mhc.ConnectionConfig(kind=kind))
    x = mhc.functional.expand(torch.randn(2, 5, 8), n)
    with pytest.raises(ShapeError, match=said):
        connection(x, torch.nn.Identity())
    # [B, T, C] looks like [T, n, C]: what is missing may be expand().
    with pytest.raises(ShapeError, match=rf"was expand\(\) .*, with n = {connection.config.n}\?"):
        connection(x[0], torch.nn.Identity())


IDLE = ["sinkhorn", "permutation", "kronecker", "exact"]


def trained(config, steps=20):
    """Rows of res in every connection before and after Adam steps with the paper's epsilon."""
    _, stack, branches, h = network(config, torch.float32, embedding_std=1.0)
    before = [res_parameters(c.maps, config.n) for c in stack.connections]
    optimizer = torch.optim.AdamW(stack.parameters(), lr=0.01, eps=1e-20, weight_decay=0)
    direction = torch.randn(2, 7, C)
    for _ in range(steps):
        (stack(h, list(branches)) * direction).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = [res_parameters(c.maps, config.n) for c in stack.connections]
    return [torch.equal(a, b) for a, b in zip(before, after, strict=True)]


def res_parameters(maps, n):
    """Slices of bias, phi and alpha that only res depends on."""
    dynamic = [maps.phi[2 * n :].flatten(), maps.alpha[2:]] if maps.phi is not None else []
    return torch.cat([maps.bias[2 * n :], *dynamic]).detach().clone()


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("constraint", IDLE)
def test_res_is_not_trained_on_rounding_noise(constraint, dynamic):
    """While streams are equal, its gradient is rounding noise."""
    unmoved = trained(ConnectionConfig(constraint=constraint, dynamic=dynamic))
    assert unmoved[0]
    assert not any(unmoved[1:])


def test_res_has_no_gradient_in_any_connection_while_streams_stay_equal():
    assert all(trained(ConnectionConfig(disable=("post",))))
    assert all(trained(ConnectionConfig(streams=1)))


def test_res_of_the_first_connection_trains_if_its_rows_need_not_sum_to_one():
    assert not any(trained(ConnectionConfig(constraint="none")))
    connection = mhc.Connection(C, ConnectionConfig(kind="hc"), equal_streams=True)
    connection(
        functional.expand(torch.randn(3, C), 4), torch.nn.Identity()
    ).square().sum().backward()
    assert connection.maps.bias.grad[8:].abs().min() > 0


def test_the_omitted_gradient_of_res_is_zero():
    """Computed in float64 by a connection that keeps the gradient."""
    connection = mhc.Connection(C, ConnectionConfig(phi_std=0.3)).double()
    x = functional.expand(torch.randn(3, C, dtype=torch.float64), 4)
    (connection(x, torch.nn.Identity()) * torch.randn(4, C)).sum().backward()
    of_res, of_pre = connection.maps.bias.grad[8:], connection.maps.bias.grad[:4]
    assert of_res.abs().max() < 1e-14 * of_pre.abs().max()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("build", [mhc.Connection, mhc.Stack])
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("mhc", r"but is 'mhc', a str; write mhc.ConnectionConfig\(kind='mhc'\)"),
        ({"streams": 2}, r"a dict; write mhc.ConnectionConfig\(\*\*config\)"),
        ({}, "a dict"),
        (0, "but is 0, a int"),
        (ConnectionConfig, "must be a ConnectionConfig or None but is <class"),
    ],
)
def test_another_type_of_configuration_raises(build, config, message):
    with pytest.raises(ConfigError, match=f"^{build.__name__}: config .*{message}"):
        build(16, config)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("value", [2.0, True, "4", None])
def test_sizes_are_integers(value):
    for build in (
        lambda: mhc.Connection(value),
        lambda: mhc.Stack(value),
        lambda: mhc.Stack(8, sublayers=value),
        lambda: mhc.Connection(8, sublayer=value),
    ):
        with pytest.raises(ConfigError, match=r"(channels|sublayers?) must be an integer but is"):
            build()


def test_repr_shows_kind_and_sizes():
    stack = mhc.Stack(8, ConnectionConfig(streams=3, numerics="deepseek_v4", disable=("post",)), 2)
    text = repr(stack)
    assert "sublayers=2, exit=learned, recompute=None" in text
    assert "mhc, streams=3, channels=8, constraint=sinkhorn, numerics=deepseek_v4" in text
    assert "dynamic=True, disable=post, bias=[15], phi=[15, 24], alpha=[3]" in text
    assert "phi=[3, 24], alpha=[1], bias=[3]" in text
    static = ConnectionConfig(kind="hc", dynamic=False)
    assert "hc, streams=4, channels=8, dynamic=False, bias=[24]" in repr(mhc.Connection(8, static))
    assert "streams=1" in repr(mhc.Connection(8, ConnectionConfig(kind="residual")).maps)
