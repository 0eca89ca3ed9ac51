"""Loss-free balancing on the preset tiny-moe."""

from dataclasses import replace

import pytest

from manifold_hc.data import DataConfig, load
from manifold_hc.training import RunFolder, preset, train
from tests.training.runs import figures


@pytest.mark.parametrize("balanced", [True, pytest.param(False, marks=pytest.mark.wide)])
def test_balancing_keeps_every_expert_loaded(tmp_path, balanced):
    """Load of the last 50 steps, layer by layer, in units of an even load."""
    config = preset("tiny-moe")
    experts = config.model.experts if balanced else replace(config.model.experts, balancing=0.0)
    config = replace(
        config,
        model=replace(config.model, experts=experts),
        training=replace(config.training, steps=150, validate_every=150, validation_batches=1),
    )
    train(config, load(DataConfig()), RunFolder(tmp_path))
    records = [r for r in figures(tmp_path) if r["event"] == "experts"]
    assert all(record["dropped_tokens"] == 0 for record in records)
    last = [record["load"] for record in records if record["step"] >= 100]
    layers = [
        [sum(loads) for loads in zip(*layer, strict=True)] for layer in zip(*last, strict=True)
    ]
    assert len(layers) == 3
    shares = [load * len(layer) / sum(layer) for layer in layers for load in layer]
    if balanced:
        assert min(shares) > 1 / 3
        assert max(shares) < 3
    else:
        assert min(shares) < 1 / 3
        assert max(shares) > 3
