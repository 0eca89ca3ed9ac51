"""Configurations that are refused before training."""

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest

from manifold_hc.config import ConnectionConfig
from manifold_hc.errors import ConfigError
from manifold_hc.parallel import ParallelConfig
from manifold_hc.parallel.config import SCHEDULES, SPLIT_BACKWARD
from manifold_hc.parallel.torchrun import require_world_size
from manifold_hc.training import RunFolder, train
from tests.training import runs


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"shard": 0}, "shard: must be at least 1 but is 0"),
        ({"replicate": -2}, "replicate: must be at least 1 but is -2"),
        ({"timeout": 0.0}, "timeout: must be a number above 0 but is 0.0"),
        ({"pipeline": 0}, "pipeline: must be at least 1 but is 0"),
        (
            {"schedule": "2F2B"},
            "schedule: must be GPipe, 1F1B, LoopedBFS, Interleaved1F1B, InterleavedZeroBubble, "
            "ZBVZeroBubble, DualPipeV but is '2F2B'",
        ),
        (
            {"pipeline": 2, "stages": 2},
            "stages: must be 1, its only number with 1F1B, or 0 for that but is 2",
        ),
        (
            {"pipeline": 2, "schedule": "DualPipeV", "stages": 3},
            "stages: must be 2, its only number with DualPipeV, or 0 for that but is 3",
        ),
        (
            {"pipeline": 2, "schedule": "Interleaved1F1B", "stages": 1},
            "stages: must be at least 2 with Interleaved1F1B or 0 for that but is 1",
        ),
        (
            {"pipeline": 2, "stages": -1},
            "stages: must be 1, its only number with 1F1B, or 0 for that but is -1",
        ),
    ],
)
def test_invalid_degrees(parallel, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        ParallelConfig(**parallel)


@pytest.mark.parametrize(
    ("started", "degrees", "message"),
    [
        ("1", {"shard": 2}, r"parallel: shard 2 needs 2 processes but 1 was started"),
        ("3", {"shard": 2, "replicate": 2}, r"replicate 2 x shard 2 needs 4 processes but 3 were"),
        ("4", {"shard": 2, "tensor": 4}, r"shard 2 x tensor 4 needs 8 processes but 4 were"),
        ("2", {}, r"parallel: 2 processes were started but nothing says how they share"),
        ("2", {"pipeline": 2, "shard": 2}, r"pipeline 2 x shard 2 needs 4 processes but 2 were"),
    ],
)
def test_the_world_size_must_match_the_degrees(started, degrees, message, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", started)
    with pytest.raises(ConfigError, match=message):
        require_world_size(ParallelConfig(**degrees))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (3, r"^parallel.tensor: must divide data.sequence=32 but is 3$"),
        (4, r"^parallel.tensor: must divide model.attention.heads=2 but is 4$"),
    ],
)
def test_sizes_must_divide_by_the_tensor_degree(tensor, message):
    with pytest.raises(ConfigError, match=message):
        replace(runs.config(), parallel=ParallelConfig(tensor=tensor))


def test_every_rank_has_a_slice_of_the_batch():
    with pytest.raises(ConfigError, match=r"training.batch: must be a multiple of 3, .* but is 4"):
        replace(runs.config(), parallel=ParallelConfig(shard=3))


def test_a_run_without_its_processes(tmp_path):
    config = replace(runs.config(), parallel=ParallelConfig(shard=2))
    with pytest.raises(ConfigError, match="needs 2 processes but has 1"):
        train(config, runs.text(), RunFolder(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("training", "parallel", "message"),
    [
        (
            {"accumulate": 4},
            {"schedule": "DualPipeV"},
            "model.blocks: must be a multiple of 4, the stages of parallel.pipeline=2 with "
            "DualPipeV, but is 2",
        ),
        (
            {},
            {},
            "training.accumulate: 1F1B over 2 stages needs at least 2 microbatches but it is 1",
        ),
        (
            {"accumulate": 2, "recompute": 3},
            {},
            "training.recompute: must be at most 2, the sublayers of a stage, but is 3",
        ),
        (
            {"accumulate": 4, "compile": True},
            {"schedule": "InterleavedZeroBubble", "stages": 2},
            "training.compile: cannot go with parallel.schedule=InterleavedZeroBubble, which "
            "computes gradients of inputs and of weights in two passes; "
            "take 1F1B or Interleaved1F1B",
        ),
    ],
)
def test_blocks_and_microbatches_must_fit_the_pipeline(training, parallel, message):
    blocks = 4 if training.get("compile") else 2
    base = runs.config(**training)
    base = replace(base, model=replace(base.model, blocks=blocks))
    with pytest.raises(ConfigError, match=f"^{message}$"):
        replace(base, parallel=ParallelConfig(pipeline=2, **parallel))


@pytest.mark.parametrize("schedule", SPLIT_BACKWARD)
def test_static_connections_and_schedules_that_split_backward(schedule):
    """torch would fail at the first step, or give wrong gradients."""
    base = runs.config(accumulate=4)
    base = replace(base, model=replace(base.model, blocks=4))
    static = replace(base, connection=ConnectionConfig(dynamic=False))
    message = f"^connection.dynamic=false: cannot go with parallel.schedule={schedule}, which"
    with pytest.raises(ConfigError, match=message):
        replace(static, parallel=ParallelConfig(pipeline=2, schedule=schedule))
    residual = replace(static, connection=ConnectionConfig(kind="residual", dynamic=False))
    replace(residual, parallel=ParallelConfig(pipeline=2, schedule=schedule))
    replace(static, parallel=ParallelConfig(pipeline=2, schedule="Interleaved1F1B"))


def test_recompute_of_more_than_the_model():
    message = "training.recompute: must be at most 4, the sublayers of the model, but is 5"
    with pytest.raises(ConfigError, match=f"^{message}$"):
        runs.config(recompute=5)


def test_dual_pipe_v_with_too_few_microbatches():
    base = runs.config(accumulate=2)
    base = replace(base, model=replace(base.model, blocks=4))
    message = "DualPipeV over 4 stages needs at least 4 microbatches but it is 2"
    with pytest.raises(ConfigError, match=f"^training.accumulate: {message}$"):
        replace(base, parallel=ParallelConfig(pipeline=2, schedule="DualPipeV"))


def test_a_schedule_that_this_torch_does_not_know(monkeypatch):
    from torch.distributed.pipelining import schedules

    from manifold_hc.parallel import schedule

    schedule.require_schedule("DualPipeV")
    monkeypatch.setattr(schedule, "get_schedule_class", schedules.get_schedule_class)
    with pytest.raises(ConfigError, match=r"torch .* does not know QuadPipe; take another one"):
        schedule.require_schedule("QuadPipe")


def torch_placement(config, microbatches, process):
    """Return whether torch's schedule takes the microbatches, and its stages of a rank."""
    from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

    stages = [
        SimpleNamespace(
            stage_index=stage,
            num_stages=config.num_stages,
            group_size=config.pipeline,
            group_rank=process,
            submod=None,
            is_first=stage == 0,
            is_last=stage == config.num_stages - 1,
        )
        for stage in config.stages_of(process)
    ]
    kind = get_schedule_class(config.schedule)
    single = issubclass(kind, PipelineScheduleSingle)
    try:
        schedule = kind(stages[0] if single else stages, microbatches, loss_fn=max)
    except ValueError:
        return False, None
    if single:
        return True, [process]
    owners = schedule.stage_index_to_group_rank
    return True, [stage for stage, owner in sorted(owners.items()) if owner == process]


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_agree_with_torch_on_microbatches_and_stages(name):
    for pipeline, microbatches in product((2, 3, 4), range(1, 13)):
        for stages in (0, 3) if SCHEDULES[name] == "loop" else (0,):
            config = ParallelConfig(pipeline=pipeline, schedule=name, stages=stages)
            try:
                config.require_microbatches(microbatches)
            except ConfigError:
                taken = False
            else:
                taken = True
            for process in range(pipeline):
                theirs, placed = torch_placement(config, microbatches, process)
                assert theirs == taken, (config, microbatches)
                assert not taken or placed == config.stages_of(process)
