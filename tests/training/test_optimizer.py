import pytest

from manifold_hc.connection import ConnectionConfig
from manifold_hc.models import Decoder, DecoderConfig
from manifold_hc.training import OptimizerConfig
from manifold_hc.training.optimizer import build, learning_rate


@pytest.mark.parametrize("kind", ["hc", "mhc"])
def test_only_matrices_decay(kind):
    config = ConnectionConfig(kind=kind, numerics="deepseek_v4")
    model = Decoder(DecoderConfig(blocks=1), config)
    decayed, kept = build(model, OptimizerConfig()).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    decayed, kept = (
        {names[id(parameter)] for parameter in group["params"]} for group in (decayed, kept)
    )
    assert decayed | kept == set(names.values())
    assert all(name.endswith((".weight", ".phi")) for name in decayed)
    assert all("norm" in name or name.endswith((".alpha", ".bias", ".0.weight")) for name in kept)
    assert "stack.connections.0.maps.phi" in decayed
    assert {"stack.connections.0.maps.alpha", "stack.connections.0.maps.bias"} <= kept


def test_the_papers_schedule():
    config = OptimizerConfig(lr=1.0, warmup=2000, schedule="step")
    rates = [learning_rate(step, 50000, config) for step in (0, 999, 1999, 2000, 39999)]
    assert rates == pytest.approx([1 / 2000, 0.5, 1, 1, 1])
    late = [learning_rate(step, 50000, config) for step in (40000, 44999, 45000, 49999)]
    assert late == pytest.approx([0.316, 0.316, 0.1, 0.1])


def test_other_schedules():
    cosine = OptimizerConfig(lr=2.0, warmup=0, schedule="cosine")
    assert [learning_rate(step, 100, cosine) for step in (0, 50, 100)] == pytest.approx(
        [2, 1.1, 0.2]
    )
    constant = OptimizerConfig(lr=2.0, warmup=4, schedule="constant")
    assert [learning_rate(step, 9, constant) for step in (0, 3, 8)] == pytest.approx([0.5, 2, 2])
