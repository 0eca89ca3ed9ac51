"""A pipeline gives the golden run of one process with the same microbatches."""

import gc
import io
import logging
import os
import time
import zlib
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

from manifold_hc.config import ConnectionConfig
from manifold_hc.diagnostics import GainMonitor
from manifold_hc.errors import DivergedError, LostProcessError
from manifold_hc.parallel import join_process_group
from manifold_hc.parallel.config import SCHEDULES
from manifold_hc.parallel.watchdog import STATUS
from manifold_hc.training import RunFolder, check
from manifold_hc.training.batch_slice import rank_slice
from manifold_hc.training.state import TrainState
from manifold_hc.training.step import backward, count_targets
from tests.parallel.layouts import CPU, distributed, layouts, run, run_all, with_microbatches
from tests.parallel.ranks import ProcessEnded, outcomes, run_on_ranks
from tests.parallel.test_golden_distributed import RUNS, compare
from tests.training import runs
from tests.training.runs import at_step

NARROW = [{"pipeline": 2, "shard": 2, "schedule": "DualPipeV"}]
WIDE = [
    {"pipeline": 4, "schedule": "DualPipeV"},
    {"pipeline": 4, "schedule": "1F1B"},
    {"pipeline": 2, "stages": 4, "schedule": "Interleaved1F1B"},
    {"pipeline": 2, "shard": 2, "schedule": "1F1B"},
    {"pipeline": 2, "shard": 2, "schedule": "InterleavedZeroBubble"},
    {"pipeline": 2, "shard": 2, "schedule": "ZBVZeroBubble"},
    {"pipeline": 2, "replicate": 2, "schedule": "DualPipeV"},
    {"pipeline": 2, "tensor": 2, "schedule": "DualPipeV"},
    {"pipeline": 2, "tensor": 2, "schedule": "Interleaved1F1B"},
    {"pipeline": 2, "shard": 2, "experts": 2, "schedule": "1F1B"},
    {"pipeline": 2, "shard": 2, "experts": 2, "schedule": "DualPipeV"},
]


def in_stages(config, blocks, microbatches, **parallel):
    """Return the run of a deeper network in a pipeline, and the equivalent run in one process."""
    parts = parallel.get("shard", 1) * parallel.get("replicate", 1)
    deeper = replace(
        config,
        model=replace(config.model, blocks=blocks),
        training=replace(config.training, batch=microbatches * parts),
    )
    alone = with_microbatches(deeper, microbatches * parts)
    return distributed(with_microbatches(deeper, microbatches), **parallel), alone


@pytest.mark.parametrize(
    "schedules",
    [
        ("1F1B", "InterleavedZeroBubble", "DualPipeV"),
        pytest.param(tuple(SCHEDULES), marks=pytest.mark.wide),
    ],
    ids=["some", "all"],
)
def test_every_schedule_over_two_processes(schedules, tmp_path):
    planned = {
        name: in_stages(runs.config(), 4, 4, pipeline=2, schedule=name) for name in schedules
    }
    run_on_ranks(2, run_all, [(config, tmp_path / name) for name, (config, _) in planned.items()])
    run(planned["1F1B"][1], tmp_path / "alone")
    for name in schedules:
        compare(tmp_path / name, tmp_path / "alone")


@pytest.mark.parametrize("parallel", layouts(NARROW, WIDE))
def test_every_layout_with_a_pipeline(parallel, tmp_path):
    base = runs.with_experts(runs.config()) if "experts" in parallel else runs.config()
    most = 8 if parallel["pipeline"] == 4 or "stages" in parallel else 4
    config, alone = in_stages(base, most, most, **parallel)
    run_on_ranks(config.parallel.size, run, config, tmp_path / "together")
    run(alone, tmp_path / "alone")
    compare(tmp_path / "together", tmp_path / "alone")


DUAL = {"pipeline": 2, "schedule": "DualPipeV"}
SPLIT = ("mhc", "hc", "bfloat16", "recompute", "experts", "single-pass", "deepseek_v4")


@pytest.mark.parametrize(
    ("parallel", "kinds"),
    [
        (DUAL, SPLIT),
        pytest.param({**DUAL, "schedule": "1F1B"}, (*RUNS, "static"), marks=pytest.mark.wide),
        pytest.param({**DUAL, "schedule": "InterleavedZeroBubble"}, SPLIT, marks=pytest.mark.wide),
        pytest.param({**DUAL, "schedule": "ZBVZeroBubble"}, SPLIT, marks=pytest.mark.wide),
        pytest.param({**DUAL, "shard": 2}, SPLIT, marks=pytest.mark.wide),
        # Along tensor, heads are summed in bfloat16.
        pytest.param(
            {**DUAL, "tensor": 2}, sorted({*SPLIT} - {"bfloat16"}), marks=pytest.mark.wide
        ),
    ],
    ids=["DualPipeV", "1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "shard 2", "tensor 2"],
)
def test_every_gradient_of_every_kind_of_network(parallel, kinds):
    """Compare the gradient of every weight, away from the initial values."""
    networks = RUNS | {"static": replace(RUNS["mhc"], connection=ConnectionConfig(dynamic=False))}
    planned = {kind: in_stages(networks[kind], 4, 4, **parallel) for kind in kinds}
    configs = [config for config, _ in planned.values()]
    found, *_ = run_on_ranks(configs[0].parallel.size, all_gradients, configs)
    for kind, gradients in zip(kinds, found, strict=True):
        alone = planned[kind][1]
        (wanted,) = all_gradients([alone])
        assert gradients.keys() == wanted.keys()
        if kind == "bfloat16":
            # Where gradients cancel, a rounding is as large as one of them.
            exact = replace(alone, training=replace(alone.training, precision="float32"))
            (in_float32,) = all_gradients([exact])
            assert distance(gradients, wanted) <= 0.25 * distance(wanted, in_float32)
            continue
        for name, gradient in wanted.items():
            error = abs(gradients[name] - gradient).max()
            assert error <= 1e-5 * abs(gradient).max() + 1e-9, (kind, name)


def distance(ours, theirs):
    """Euclidean distance of all gradients as one vector."""
    return sum(((ours[name] - theirs[name]) ** 2).sum() for name in theirs) ** 0.5


def all_gradients(configs):
    """Return the unsharded gradients after one batch, one dictionary per run, on rank 0."""
    with join_process_group(configs[0].parallel, CPU) as processes:
        return [gradients(config, processes) for config in configs]


def gradients(config, processes):
    state = after_a_batch(config, processes)
    with torch.no_grad():
        for weight in state.model.parameters():
            weight.copy_(torch.zeros_like(weight) if weight.grad is None else weight.grad)
    return {name: weight.numpy() for name, weight in state.weights().items()}


def after_a_batch(config, processes):
    """Return a state with perturbed weights and the gradients of one batch."""
    state = TrainState(config, CPU, processes)
    generator = torch.Generator()
    with torch.no_grad():
        for name, weight in state.model.named_parameters():
            generator.manual_seed(zlib.crc32(name.encode()))
            noise = 0.02 * torch.randn(weight.shape, generator=generator)
            if isinstance(weight, DTensor):
                noise = distribute_tensor(noise, weight.device_mesh, weight.placements)
            weight += noise
    batch = rank_slice(check(config, runs.text()).training, 0, processes)
    targets = int(processes.all_reduce_data(count_targets(batch.targets)))
    backward(state.model, batch, targets, config.training)
    return state


def observed(config, folder, documents):
    run(config, folder, [GainMonitor], documents)


def test_figures_of_all_stages_are_in_depth_order(tmp_path):
    """Gains, streams and expert loads, with attention within documents."""
    experts = runs.with_experts(runs.config(probe_every=9))
    config, alone = in_stages(experts, 4, 4, pipeline=2, schedule="DualPipeV")
    run_on_ranks(2, observed, config, tmp_path / "together", 900)
    observed(alone, tmp_path / "alone", 900)
    compare(tmp_path / "together", tmp_path / "alone")
    found, wanted = (records(tmp_path / name) for name in ("together", "alone"))
    assert len(wanted) == 8, "four looks at gains and four at experts"
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        for name, figure in other.items():
            if name == "load":
                assert len(figure) == 3
                assert one[name] == figure, "no choice has flipped"
            elif isinstance(figure, list | float):
                close = torch.testing.assert_close
                close(torch.tensor(one[name]), torch.tensor(figure), rtol=1e-4, atol=1e-5)
            else:
                assert isinstance(figure, dict) or one[name] == figure
    for average in ("gains", "matrices"):
        for row, figure in wanted[-1][average].items():
            assert len(figure) == 8
            assert found[-1][average][row] == pytest.approx(figure, rel=1e-4)
    summaries = [RunFolder(tmp_path / name).summary() for name in ("together", "alone")]
    assert summaries[0]["parameters"] == summaries[1]["parameters"]


@pytest.mark.wide
def test_figures_are_computed_in_float32_also_in_bfloat16_training(tmp_path):
    config, alone = in_stages(runs.config(steps=1, precision="bfloat16"), 4, 4, **DUAL)
    run_on_ranks(2, observed, config, tmp_path / "together", 1)
    observed(alone, tmp_path / "alone", 1)
    found, wanted = (records(tmp_path / name)[0] for name in ("together", "alone"))
    for figure in ("stream_cosine", "stream_rank", "log_column_sum"):
        assert found[figure] == pytest.approx(wanted[figure], rel=1e-4, abs=1e-6)


def records(folder):
    return [
        record
        for record in RunFolder(folder).metrics()
        if record["event"] not in ("step", "validation")
    ]


def spoil_a_block(model):
    """Make an output infinite on rank 1, which holds the layer."""
    if dist.get_rank() == 1:
        model.get_submodule("branches.5.down").weight.data[0, 0] = float("inf")


def run_with_spoilt_block(config, folder):
    run(config, folder, [at_step(2, spoil_a_block)])


def test_a_divergence_names_the_first_layer_of_all_stages(tmp_path):
    """Later layers, on rank 0, have infinite outputs too."""
    config, _ = in_stages(runs.config(probe_every=1), 4, 4, pipeline=2, schedule="DualPipeV")
    first = r"first in parameter group 'layers' \(output of branches\.5\.down\)"
    with pytest.raises(DivergedError, match=rf"loss is not finite at step 3, {first}"):
        run_on_ranks(2, run_with_spoilt_block, config, tmp_path)


def sleep_in_backward(model):
    """Hang rank 1 in backward; rank 0 waits for it."""
    if dist.get_rank() == 1:
        weight = model.get_submodule("branches.4.query").weight
        weight.register_hook(lambda grad: time.sleep(1000))


def sleep_ahead(model):
    """Hang rank 0 one microbatch ahead of rank 1, which waits for it."""
    calls = []

    def sleep(*_):
        calls.append(torch.is_grad_enabled())
        if sum(calls) == 2:
            time.sleep(1000)

    if dist.get_rank() == 0:
        model.get_submodule("branches.3").register_forward_hook(sleep)


def sleep_in_the_update(model):
    """Hang rank 0 after the last microbatch."""
    if dist.get_rank() == 0:
        torch.optim.AdamW.step = lambda *_: time.sleep(1000)


def hanging(how, config, folder):
    handler = logging.FileHandler(folder / f"log of {os.environ['RANK']}")
    logging.getLogger("manifold_hc").addHandler(handler)
    run(config, folder / "run", [at_step(3, how)])


@pytest.mark.parametrize(
    ("how", "schedule", "where"),
    [
        pytest.param(
            sleep_in_backward,
            "1F1B",
            "rank 1 is behind at 'step 4, forward and backward, stage 1, microbatch 0, backward'",
            marks=pytest.mark.wide,
        ),
        pytest.param(
            sleep_ahead, "1F1B", "forward, sublayer 3', last heard of", marks=pytest.mark.wide
        ),
        (sleep_in_the_update, "DualPipeV", "rank 0 is behind at 'step 4, update'"),
    ],
)
def test_a_stage_that_hangs_is_named(how, schedule, where, tmp_path):
    config, _ = in_stages(
        runs.config(probe_every=1), 4, 4, pipeline=2, schedule=schedule, timeout=10.0
    )
    found = outcomes(2, hanging, how, config, tmp_path)
    assert any(isinstance(answer, ProcessEnded) and answer.args == (STATUS,) for answer in found)
    said = "".join(path.read_text() for path in tmp_path.glob("log of *"))
    assert where in said


def failing(config, folder):
    def fail(*_):
        raise MemoryError("no room here")

    def spoil(model):
        if dist.get_rank() == 1:
            model.get_submodule("branches.3").register_forward_hook(fail)

    noise = io.StringIO()
    logging.getLogger("torch.distributed").addHandler(logging.StreamHandler(noise))
    try:
        run(config, folder, [at_step(2, spoil)])
    except (MemoryError, LostProcessError) as error:
        return type(error), str(error), noise.getvalue()


def test_an_error_in_a_stage_is_raised_unwrapped(tmp_path):
    """torch would wrap it, and log the plan of every rank first."""
    config, _ = in_stages(runs.config(probe_every=1), 4, 4, **DUAL)
    other, failed = run_on_ranks(2, failing, config, tmp_path)
    assert failed == (MemoryError, "no room here", "")
    assert other[0] is LostProcessError


def streams_alive(config):
    """Number of microbatches whose streams are alive between two batches."""
    with join_process_group(config.parallel, CPU) as processes:
        state = after_a_batch(config, processes)
        gc.collect()
        size = (1, config.data.sequence, 4, config.model.channels)
        alive = sum(type(t) is torch.Tensor and t.shape == size for t in gc.get_objects())
        del state  # which was there until now
        return alive


@pytest.mark.parametrize("schedule", ["1F1B", "DualPipeV"])
def test_no_streams_are_kept_from_batch_to_batch(schedule):
    config, _ = in_stages(runs.config(), 4, 4, pipeline=2, schedule=schedule)
    assert run_on_ranks(2, streams_alive, config) == [0, 0]
