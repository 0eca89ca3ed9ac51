"""The size of a model in closed form, against the model itself on the meta device."""

from dataclasses import replace

import pytest
import torch

from manifold_hc.config import ConnectionConfig
from manifold_hc.errors import ConfigError
from manifold_hc.models import Decoder
from manifold_hc.training import PRESETS, RunConfig
from manifold_hc.training import size as sizes

CONNECTIONS = {
    "mhc": ConnectionConfig(),
    "many streams": ConnectionConfig(streams=24),
    "static": ConnectionConfig(dynamic=False),
    "permutation": ConnectionConfig(constraint="permutation"),
    "res disabled": ConnectionConfig(disable=("res",)),
    "hc": ConnectionConfig(kind="hc"),
    "residual": ConnectionConfig(kind="residual"),
}


@pytest.mark.parametrize(
    ("name", "connection"), [("3b", "mhc"), *(("tiny-moe", name) for name in CONNECTIONS)]
)
def test_all_matrices_are_counted(name, connection):
    model, chosen = PRESETS[name].model, CONNECTIONS[connection]
    with torch.device("meta"):
        built = Decoder(model, chosen)
    counted = sizes.weights_of(model, chosen)
    matrices = sum(p.numel() for p in built.parameters() if p.ndim > 1)
    assert counted == matrices
    assert counted > 0.98 * sum(p.numel() for p in built.parameters())


def test_sizes_beyond_the_limits_are_refused():
    base = RunConfig()
    for change in (
        {"blocks": 4097},
        {"blocks": 2**31},
        {"channels": 2**31 - 1, "feed_forward": 2**31 - 1},
        {"channels": 2**63},
        {"vocabulary": 10**400},
    ):
        with pytest.raises(ConfigError, match=r"must (be|have) at most"):
            replace(base, model=replace(base.model, **change))
    with pytest.raises(ConfigError, match="model: must have at most"):
        replace(base, connection=ConnectionConfig(streams=2**20))
    assert replace(base, model=replace(base.model, blocks=4096)).model.blocks == 4096


def test_more_than_the_memory_is_refused(monkeypatch):
    model, connection, device = PRESETS["27b"].model, ConnectionConfig(), torch.device("cpu")
    needed = sizes.weights_of(model, connection) * 16
    monkeypatch.setattr(sizes, "_memory", lambda device: needed - 1)
    with pytest.raises(ConfigError, match=r"need 403 GiB but cpu has 403 GiB; .* parallel\.shard"):
        sizes.require_room(model, connection, device, 1)
    sizes.require_room(model, connection, device, 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="need 806 GiB"):
        sizes.require_room(model, connection, device, 2)
    monkeypatch.setattr(sizes, "_memory", lambda device: None)
    sizes.require_room(model, connection, device, 1)


def test_memory_is_that_of_the_machine():
    assert 2**28 < sizes._memory(torch.device("cpu")) < 2**50
    assert sizes._memory(torch.device("meta")) is None


def test_values_that_json_cannot_hold():
    base = RunConfig()
    for change in ({"paths": ("a\0b",)}, {"paths": ("x\udcff",)}, {"boundary": "\ud800"}):
        with pytest.raises(ConfigError, match="UTF-8"):
            replace(base, data=replace(base.data, **change))
    with pytest.raises(ConfigError, match=r"parallel\.stages: must fit into 64 bits"):
        replace(base, parallel=replace(base.parallel, stages=2**63))
