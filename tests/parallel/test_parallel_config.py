"""What is refused before any process starts training."""

from dataclasses import replace

import pytest

from manifold_hc.errors import ConfigError
from manifold_hc.parallel import ParallelConfig
from manifold_hc.parallel.config import require_started
from manifold_hc.training import RunFolder, train
from tests.training import runs


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"shard": 0}, "shard: must be at least 1 but is 0"),
        ({"replicate": -2}, "replicate: must be at least 1 but is -2"),
        ({"timeout": 0.0}, "timeout: must be a number above 0 but is 0.0"),
    ],
)
def test_degrees_that_there_are_not(parallel, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        ParallelConfig(**parallel)


@pytest.mark.parametrize(
    ("started", "degrees", "message"),
    [
        ("1", {"shard": 2}, r"parallel: shard 2 needs 2 processes but 1 was started"),
        ("3", {"shard": 2, "replicate": 2}, r"replicate 2 x shard 2 needs 4 processes but 3 were"),
        ("4", {"shard": 2, "tensor": 4}, r"shard 2 x tensor 4 needs 8 processes but 4 were"),
        ("2", {}, r"parallel: 2 processes were started but nothing says how they share"),
    ],
)
def test_as_many_processes_as_the_degrees_say(started, degrees, message, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", started)
    with pytest.raises(ConfigError, match=message):
        require_started(ParallelConfig(**degrees))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (3, r"^parallel.tensor: must divide data.sequence=32 but is 3$"),
        (4, r"^parallel.tensor: must divide model.attention.heads=2 but is 4$"),
    ],
)
def test_what_the_tensor_axis_divides(tensor, message):
    with pytest.raises(ConfigError, match=message):
        replace(runs.config(), parallel=ParallelConfig(tensor=tensor))


def test_every_process_has_a_part_of_the_batch():
    with pytest.raises(ConfigError, match=r"training.batch: must be a multiple of 3, .* but is 4"):
        replace(runs.config(), parallel=ParallelConfig(shard=3))


def test_a_run_without_its_processes(tmp_path):
    config = replace(runs.config(), parallel=ParallelConfig(shard=2))
    with pytest.raises(ConfigError, match="needs 2 processes but has 1"):
        train(config, runs.text(), RunFolder(tmp_path))
    assert not list(tmp_path.iterdir())
