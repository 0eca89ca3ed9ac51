import doctest
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import manifold_hc as mhc
from manifold_hc import diagnostics
from manifold_hc.diagnostics import GainMonitor, amax_gain
from manifold_hc.errors import ConfigError, ShapeError

FIRST = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
SECOND = torch.tensor([[0.0, 1.0], [5.0, -4.0]])


def test_two_asymmetric_matrices_by_hand():
    """SECOND FIRST = [[0, 3], [5, -2]]: rows 3 and 3, columns 5 and 1.

    Alone: FIRST has rows 3, 3 and columns 1, 5; SECOND has rows 1, 1 (signed) and columns 5, 3.
    """
    gain = amax_gain(torch.stack([FIRST, SECOND]))
    assert gain.forward.tolist() == [3, 1]
    assert gain.backward.tolist() == [5, 5]
    assert gain.composite_forward.tolist() == [3, 1]
    assert gain.composite_backward.tolist() == [5, 5]


def test_forward_gain_bounds_a_signal_and_backward_gain_a_gradient():
    """The reference is `write` itself: equal streams in, largest stream out."""
    matrices = torch.rand(5, 3, 3)
    gain = amax_gain(matrices)
    signal = torch.ones(3, 1)
    for res in matrices:
        signal = mhc.functional.write(signal, torch.zeros(1), torch.zeros(3), res)
    gradient_in = torch.ones(3, 1, requires_grad=True)
    x = gradient_in
    for res in matrices:
        x = mhc.functional.write(x, torch.zeros(1), torch.zeros(3), res)
    (gradient,) = torch.autograd.grad(x.sum(), gradient_in)
    assert float(signal.max()) == pytest.approx(float(gain.composite_forward[0]))
    assert float(gradient.max()) == pytest.approx(float(gain.composite_backward[0]))
    assert float(gain.composite_forward[0]) != pytest.approx(float(gain.composite_backward[0]))


def test_composites_multiply_towards_the_exit():
    products = diagnostics.composites(torch.stack([FIRST, SECOND]))
    assert products[0].tolist() == [[0, 3], [5, -2]]
    assert products[1].tolist() == SECOND.tolist()


def test_the_two_token_averages():
    """Two tokens, I and -I: each has gain 1, their mean has gain 0."""
    eye = torch.eye(2)
    matrices = torch.stack([eye, -eye]).unsqueeze(0)
    assert amax_gain(matrices, "gains").forward.tolist() == [1]
    assert amax_gain(matrices, "matrices").forward.tolist() == [0]


def test_composites_are_taken_token_by_token():
    """Token means multiply to 0; tokens themselves to I."""
    eye = torch.eye(2)
    layer = torch.stack([eye, -eye])
    gain = amax_gain(torch.stack([layer, layer]), "matrices")
    assert gain.composite_forward.tolist() == [1, 0]


def test_products_of_doubly_stochastic_matrices_have_gain_one():
    gain = amax_gain(mhc.constraints.exact(torch.randn(30, 7, 4, 4, dtype=torch.float64)))
    for row in gain:
        torch.testing.assert_close(row, torch.ones_like(row))


def test_log_column_sum_of_attenuation():
    half = 0.5 * torch.eye(3).unsqueeze(0)
    assert amax_gain(half).backward.tolist() == [0.5]
    assert diagnostics.log_column_sum(half).tolist() == pytest.approx([math.log(2)])


def test_distance_to_doubly_stochastic():
    matrices = torch.stack([torch.eye(2), FIRST, torch.tensor([[1.5, -0.5], [-0.5, 1.5]])])
    assert diagnostics.stochastic_distance(matrices).tolist() == [0, 4, 0.5]


def test_stream_figures():
    equal = torch.randn(5, 1, 8).expand(5, 4, 8)
    assert diagnostics.pairwise_cosine(equal) == pytest.approx(1)
    assert diagnostics.effective_rank(equal) == pytest.approx(1, abs=1e-3)
    orthogonal = torch.eye(4, 8).expand(5, 4, 8)
    assert diagnostics.pairwise_cosine(orthogonal) == pytest.approx(0)
    assert diagnostics.effective_rank(orthogonal) == pytest.approx(4)
    assert diagnostics.pairwise_cosine(torch.randn(5, 1, 8)) == 1
    assert diagnostics.pairwise_cosine(torch.zeros(5, 4, 8)) == 0
    assert math.isnan(diagnostics.effective_rank(torch.full((5, 4, 8), math.nan)))


class Network(nn.Module):
    def __init__(self, config, sublayers=3):
        super().__init__()
        self.stack = mhc.Stack(8, config, sublayers)
        self.dropout = nn.Dropout(0.5)

    def forward(self, h):
        h = h + 0 * torch.rand_like(h)
        return self.stack(self.dropout(h), [torch.sin] * len(self.stack.connections))


@pytest.mark.parametrize("kind", ["residual", "hc", "mhc"])
def test_the_monitor_reports_the_matrices_of_the_forward_pass(kind):
    model = Network(mhc.ConnectionConfig(kind=kind, streams=3, phi_std=1.0))
    if kind != "residual":
        for connection in model.stack.connections:
            nn.init.normal_(connection.maps.bias)
    model.train()
    probe, used = torch.randn(2, 5, 8), []
    figures = GainMonitor(probe)(model)

    model.eval()
    x = mhc.functional.expand(probe, model.stack.config.n)
    for connection in model.stack.connections:
        used.append(connection.maps(x)[2].flatten(0, 1))
        x = connection(x, torch.sin)
    wanted = amax_gain(torch.stack(used))
    for name, row in wanted._asdict().items():
        assert figures["gains"][name] == pytest.approx(row.tolist(), rel=1e-6)
    assert figures["gain_forward"] == max(figures["gains"]["composite_forward"])
    assert figures["gain_backward"] == max(figures["gains"]["composite_backward"])
    other = amax_gain(torch.stack(used), "matrices")
    assert figures["matrices"]["forward"] == pytest.approx(other.forward.tolist(), rel=1e-6)
    n = model.stack.config.n
    assert torch.tensor(figures["composite"]).shape == (3, n, n)
    assert all(len(figures[key]) == 3 for key in ("log_column_sum", "stream_cosine", "stream_rank"))
    if kind == "residual":
        assert figures["gain_forward"] == figures["gain_backward"] == 1


def fixed(res):
    """A static HC connection with this mixing matrix."""
    connection = mhc.Connection(8, mhc.ConnectionConfig(kind="hc", streams=2, dynamic=False))
    with torch.no_grad():
        connection.maps.bias[4:] = res.flatten()
    return connection


class Backwards(nn.Module):
    """Registers its connections in the opposite order, and calls the first one twice."""

    def __init__(self):
        super().__init__()
        self.second, self.first = fixed(SECOND), fixed(FIRST)

    def forward(self, x):
        x = self.first(self.first(x, torch.sin), torch.sin)
        return self.second(x, torch.sin)


def test_sublayers_are_in_the_order_of_the_calls():
    figures = GainMonitor(torch.randn(3, 2, 8))(Backwards())
    wanted = amax_gain(torch.stack([FIRST, FIRST, SECOND]))
    for name, row in wanted._asdict().items():
        assert figures["gains"][name] == pytest.approx(row.tolist(), rel=1e-6)
    assert len(GainMonitor(torch.randn(2, 8))(Backwards())["stream_rank"]) == 3, (
        "no batch dimension"
    )


def test_connections_with_different_streams_are_an_error():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = mhc.Stack(8, mhc.ConnectionConfig(streams=2), 1)
            self.b = mhc.Stack(8, mhc.ConnectionConfig(streams=3), 1)

        def forward(self, h):
            return self.b(self.a(h, [torch.sin]), [torch.sin])

    with pytest.raises(ShapeError, match="watch one stack at a time"):
        GainMonitor(torch.randn(2, 8))(Mixed())


def test_the_monitor_changes_no_state_of_the_model():
    model = Network(mhc.ConnectionConfig())
    model.train()
    model.stack.eval()
    probe = torch.randn(2, 8)
    state = torch.get_rng_state()
    GainMonitor(probe)(model)
    assert model.training
    assert model.dropout.training
    assert not model.stack.training
    assert all(p.grad is None for p in model.parameters())
    assert not any(c.maps._forward_hooks for c in model.stack.connections)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.usefixtures("unchecked")
def test_invalid_arguments_are_errors():
    with pytest.raises(ShapeError, match=r"matrices must be \[L, n, n\]"):
        amax_gain(torch.randn(3, 4))
    with pytest.raises(ShapeError, match="empty"):
        amax_gain(torch.randn(0, 4, 4))
    with pytest.raises(ConfigError, match="average must be gains or matrices"):
        amax_gain(torch.randn(1, 4, 4), "mean")
    with pytest.raises(ConfigError, match=r"calls no manifold_hc\.Connection"):
        GainMonitor(torch.randn(2, 8))(nn.Linear(8, 8))


@pytest.mark.slow
def test_the_monitor_records_compiled_models():
    """In a process without jaxtyping's shape checks, which Dynamo cannot trace."""
    script = Path(__file__).with_name("compiled_models.py")
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": "."},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == ["wrapped", "in-place", "stack", "branches", "maps"]


def test_a_probe_may_be_positional_or_keyword_arguments():
    net, h = Network(mhc.ConnectionConfig(phi_std=0.1)), torch.randn(2, 5, 8)
    wanted = GainMonitor(h)(net)
    assert GainMonitor((h,))(net) == wanted
    assert GainMonitor({"h": h})(net) == wanted


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("probe", [[1, 2, 3], "text", None])
def test_a_probe_of_another_type_is_an_error(probe):
    with pytest.raises(ConfigError, match="GainMonitor: probe must be a tensor, a tuple"):
        GainMonitor(probe)


@pytest.mark.parametrize("name", ["gain", "monitor", "streams"])
def test_the_examples_run(name):
    module = sys.modules[f"manifold_hc.diagnostics.{name}"]
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
