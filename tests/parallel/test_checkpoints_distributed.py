"""Checkpoints written by one layout and resumed by another."""

import logging
import os
import resource
import signal
from dataclasses import replace

import pytest
import torch.distributed as dist

from manifold_hc.errors import CheckpointError, RunFolderError, StoppedError
from manifold_hc.parallel import ParallelConfig, join_process_group
from manifold_hc.training import CheckpointConfig, Checkpoints, RunFolder, checkpoint_files
from manifold_hc.training.checkpoint_files import load, verify
from manifold_hc.training.state import TrainState
from tests.parallel.layouts import CPU, distributed, figures, run, with_microbatches
from tests.parallel.ranks import run_on_ranks
from tests.training import runs
from tests.training.runs import at_step

EXPERTS = runs.with_experts(runs.config(probe_every=1))
NARROW = [{"shard": 2}, {"pipeline": 2, "schedule": "DualPipeV"}, {}]
WIDE = [
    {"shard": 2},
    {"pipeline": 2, "shard": 2, "schedule": "ZBVZeroBubble"},
    {},
    {"pipeline": 4},
    {"shard": 2, "tensor": 2},
    {"replicate": 2, "pipeline": 2, "schedule": "Interleaved1F1B"},
    {"shard": 4},
]


def rank0_receives(number):
    def send(model):
        if not dist.is_initialized() or dist.get_rank() == 0:
            os.kill(os.getpid(), number)

    return send


def stopped_after(step, config, folder):
    """Send Ctrl-C to rank 0 at a step; return the step of the stop, and whether it was saved."""
    try:
        run(config, folder, [at_step(step - first_step(folder), rank0_receives(signal.SIGINT))])
    except StoppedError as stopped:
        return stopped.step, stopped.saved


def first_step(folder):
    paths = Checkpoints(folder / "checkpoints", CheckpointConfig(), "").paths()
    return int(paths[-1].name[5:]) if paths else 0


@pytest.mark.parametrize(
    ("order", "asynchronous"),
    [
        (NARROW, True),
        pytest.param(NARROW, False, marks=pytest.mark.wide),
        pytest.param(WIDE, True, marks=pytest.mark.wide),
        pytest.param(WIDE, False, marks=pytest.mark.wide),
    ],
)
def test_every_layout_resumes_from_every_other(order, asynchronous, tmp_path):
    """Stopped after every third step, the run resumes in another layout."""
    saving = CheckpointConfig(every=2, keep=3, asynchronous=asynchronous)
    config = runs.with_experts(runs.config(probe_every=1, checkpoint=saving))
    config = replace(config, model=replace(config.model, blocks=4))
    for number, degrees in enumerate(order, start=1):
        pieces = 4 // ParallelConfig(**degrees).dp_size
        here = distributed(with_microbatches(config, pieces), **degrees)
        size = here.parallel.size
        if number < len(order):
            stops = run_on_ranks(size, stopped_after, 3 * number - 1, here, tmp_path / "moving")
            assert stops == [(3 * number, True)] * size
        else:
            run_on_ranks(size, run, here, tmp_path / "moving")
    run(with_microbatches(config, 4), tmp_path / "calm")
    found, wanted = figures(tmp_path / "moving"), figures(tmp_path / "calm")
    assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
    assert found["validation"] == pytest.approx(wanted["validation"], rel=1e-5)
    for path in Checkpoints(tmp_path / "moving" / "checkpoints", saving, "").paths():
        verify(path)
    assert not list((tmp_path / "moving" / "checkpoints").glob(".*"))


def test_a_resumed_run_of_two_ranks_is_the_same_to_the_bit(tmp_path):
    config = distributed(EXPERTS, shard=2)
    run_on_ranks(2, stopped_after, 6, config, tmp_path / "stopped")
    run_on_ranks(2, run, config, tmp_path / "stopped")
    run_on_ranks(2, run, config, tmp_path / "calm")
    assert figures(tmp_path / "stopped") == figures(tmp_path / "calm")
    weights = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("stopped", "calm")]
    assert weights[0] == weights[1]


def test_a_checkpoint_before_the_first_step(tmp_path):
    """Moments before the first step are saved and loaded like all others."""
    config = distributed(EXPERTS, shard=2)
    assert run_on_ranks(2, saved_at_once, config, tmp_path) == [True, True]


def saved_at_once(config, folder):
    with join_process_group(config.parallel, CPU) as processes:
        saved = Checkpoints(folder, config.checkpoint, "", processes)
        saved.write(TrainState(config, CPU, processes))
        other = TrainState(config, CPU, processes)
        load(saved.find(), other)
        return other.step == 0 and all(
            not state["exp_avg"].to_local().any() for state in other.optimizer.state.values()
        )


def damaged(folder, how, which=-1):
    """Truncate the first file of the checkpoint, alter or remove another; return its path."""
    path = Checkpoints(folder / "checkpoints", CheckpointConfig(), "").paths()[which]
    file = path / ("__0_0.distcp" if how == "truncated" else "__1_0.distcp")
    content = bytearray(file.read_bytes())
    if how == "truncated":
        file.write_bytes(content[:-1])
    elif how == "altered":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif how == "gone":
        file.unlink()
    elif how == "one too many":
        (path / "__2_0.distcp").write_bytes(content)
    return path


def found_by(config, folder, step=None):
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("manifold_hc").addHandler(handler)
    with join_process_group(config.parallel, CPU) as processes:
        saved = Checkpoints(folder / "checkpoints", config.checkpoint, "", processes)
        try:
            return saved.find(step), messages
        except CheckpointError as error:
            return str(error), messages


@pytest.mark.parametrize(
    "how",
    [
        "truncated",
        "altered",
        pytest.param("gone", marks=pytest.mark.wide),
        pytest.param("one too many", marks=pytest.mark.wide),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_loudly(how, tmp_path):
    config = distributed(
        runs.config(steps=4, checkpoint=CheckpointConfig(every=2, keep=3, best=False)), shard=2
    )
    run_on_ranks(2, run, config, tmp_path)
    path = damaged(tmp_path, how)
    (first, said), (second, _) = run_on_ranks(2, found_by, config, tmp_path)
    assert first == second == path.with_name("step-00000002")
    assert "DAMAGED AND PASSED OVER" in said[0]
    assert str(path) in said[0]
    errors = run_on_ranks(2, found_by, config, tmp_path, 4)
    assert errors[0][0] == errors[1][0]
    assert str(path) in errors[0][0]
    damaged(tmp_path, "truncated", 0)
    errors = run_on_ranks(2, found_by, config, tmp_path)
    assert "every one in" in errors[0][0]
    assert errors[0][0] == errors[1][0]


def limit(size):
    """No file of this process may grow beyond so many bytes, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (most if size is None else size, most))


def limit_last_rank(size):
    return lambda model: limit(size) if dist.get_rank() == dist.get_world_size() - 1 else None


def without_room(config, folder):
    observers = [
        at_step(5, limit_last_rank(50_000)),
        at_step(9, limit_last_rank(None)),
    ]
    run(config, folder, observers)


@pytest.mark.parametrize(
    "asynchronous",
    [pytest.param(False, marks=pytest.mark.wide), True],
    ids=["waited for", "asynchronous"],
)
def test_a_full_disk_stops_nothing_but_the_save(asynchronous, tmp_path):
    """The disk of rank 1 is full from step 5 to step 9."""
    saving = CheckpointConfig(every=4, keep=9, best=False, asynchronous=asynchronous)
    config = distributed(runs.config(probe_every=1, checkpoint=saving), shard=2)
    run_on_ranks(2, without_room, config, tmp_path / "full")
    run_on_ranks(2, run, config, tmp_path / "calm")
    assert figures(tmp_path / "full") == figures(tmp_path / "calm")
    saved = Checkpoints(tmp_path / "full" / "checkpoints", saving, "")
    steps = [int(path.name[5:]) for path in saved.paths()]
    assert steps == [4, 12, 16, 20]
    for path in saved.paths():
        verify(path)
    assert not list(saved.folder.glob(".*"))


def test_an_asynchronous_save_holds_the_step_it_is_of(tmp_path):
    """Training continues while the checkpoint is written, without changing its content."""
    for asynchronous in (False, True):
        saving = CheckpointConfig(every=1, keep=99, asynchronous=asynchronous)
        config = runs.config(steps=6, checkpoint=saving)
        run(config, tmp_path / str(asynchronous))
    for step in range(1, 7):
        for file in ("__0_0.distcp", "model.safetensors"):
            name = f"checkpoints/step-{step:08}/{file}"
            one, other = (tmp_path / str(asynchronous) / name for asynchronous in (False, True))
            assert one.read_bytes() == other.read_bytes()


def save_without_files_of_rank1(config, folder):
    """Save as if rank 1 had written to another disk."""
    write = checkpoint_files.Writer.write_data

    def elsewhere(self, plan, planner):
        written = write(self, plan, planner)
        if dist.get_rank() == 1:
            for file in self.temporary.glob("__1_*"):
                file.unlink()
        return written

    checkpoint_files.Writer.write_data = elsewhere
    with join_process_group(config.parallel, CPU) as processes:
        saved = Checkpoints(folder, config.checkpoint, "", processes)
        with pytest.raises(OSError, match=r"__1_0.distcp of another process is not there"):
            saved.write(TrainState(config, CPU, processes))


def test_a_checkpoint_without_the_files_of_all_processes_gets_no_name(tmp_path):
    run_on_ranks(2, save_without_files_of_rank1, distributed(EXPERTS, shard=2), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_shared_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("manifold_hc.training.folder.PAUSE", 0)
    run_folder = RunFolder(tmp_path)
    with pytest.raises(RunFolderError, match=r"must be on a file system that all processes share"):
        run_folder.require_shared(EXPERTS)
    run_folder.begin(EXPERTS)
    run_folder.require_shared(EXPERTS)
