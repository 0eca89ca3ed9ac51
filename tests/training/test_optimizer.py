import pytest

from manifold_hc.config import ConnectionConfig
from manifold_hc.models import Decoder, DecoderConfig, ExpertsConfig
from manifold_hc.training import OptimizerConfig
from manifold_hc.training.optimizer import build, learning_rate


@pytest.mark.parametrize("kind", ["hc", "mhc"])
def test_only_matrices_decay(kind):
    config = ConnectionConfig(kind=kind, numerics="deepseek_v4")
    experts = ExpertsConfig(routed=4, width=8)
    model = Decoder(DecoderConfig(blocks=2, experts=experts), config)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = build(model, OptimizerConfig()).param_groups
    by_name = {g["name"]: {names[p] for p in g["params"]} for g in groups}
    assert {g["name"]: g["weight_decay"] for g in groups} == {
        "embedding": 0.1,
        "layers": 0.1,
        "router": 0.1,
        "experts": 0.1,
        "norms": 0.0,
        "connections": 0.1,
        "connections, vectors": 0.0,
    }
    assert sum(map(len, by_name.values())) == len(names)
    assert set().union(*by_name.values()) == set(names.values())
    assert all(name.endswith((".alpha", ".bias")) for name in by_name["connections, vectors"])
    assert all(name.endswith(".phi") for name in by_name["connections"])
    assert all("norm" in name for name in by_name["norms"])
    assert by_name["router"] == {"branches.3.router.weight"}
    assert "branches.3.routed.gate_up" in by_name["experts"]
    assert {"head.weight", "branches.3.shared.down.weight"} <= by_name["layers"]


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
