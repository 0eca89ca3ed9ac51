import json
import shutil
import subprocess
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from manifold_hc.config import ConnectionConfig
from manifold_hc.errors import CheckpointError
from manifold_hc.training import CheckpointConfig, Checkpoints, OptimizerConfig
from manifold_hc.training import optimizer as optimizers
from manifold_hc.training.checkpoint_files import load, read_manifest, verify
from manifold_hc.training.state import TrainState
from manifold_hc.training.step import take_step
from manifold_hc.training.trainer import check
from tests.training import runs

CONFIG = runs.with_experts(runs.config(steps=50))
KEEP_ALL = CheckpointConfig(keep=99, best=False)
CPU = torch.device("cpu")


def walk(state, steps):
    batches = check(CONFIG, runs.text()).training
    return [take_step(state, batches.take(state.sequences, 4), CONFIG).loss for _ in range(steps)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of steps 2, 4 and 6, and the losses of the three steps after the last."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    state, checkpoints = TrainState(CONFIG, CPU), Checkpoints(folder, KEEP_ALL, "data")
    for _ in range(3):
        walk(state, 2)
        assert checkpoints.save(state)
    return folder, walk(state, 3)


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "run" / "checkpoints")
    return Checkpoints(tmp_path / "run" / "checkpoints", KEEP_ALL, "data")


def test_a_restored_state_gives_the_same_losses(saved):
    folder, wanted = saved
    state = TrainState(CONFIG, CPU)
    torch.rand(7)
    manifest = load(folder / "step-00000006", state)
    assert (state.step, state.sequences) == (manifest.step, manifest.sequences) == (6, 24)
    assert walk(state, 3) == wanted


def test_random_states_are_restored(copy):
    state = TrainState(CONFIG, CPU)
    load(copy.paths()[-1], state)
    walk(state, 1)
    assert copy.save(state)
    wanted = torch.rand(3)
    torch.manual_seed(99)
    load(copy.paths()[-1], state)
    assert torch.equal(torch.rand(3), wanted)


def test_optimizer_options_come_from_the_configuration(saved):
    told = replace(CONFIG.optimizer, weight_decay=0.5, betas=(0.8, 0.9))
    state = TrainState(replace(CONFIG, optimizer=told), CPU)
    load(saved[0] / "step-00000006", state)
    groups = state.optimizer.param_groups
    assert {group["weight_decay"] for group in groups} == {0.0, 0.5}
    assert {group["betas"] for group in groups} == {(0.8, 0.9)}
    assert all(entry["exp_avg"].any() for entry in state.optimizer.state.values())


def test_weights_alone_are_safetensors(saved):
    folder, _ = saved
    state = TrainState(CONFIG, CPU)
    load(folder / "step-00000004", state)
    weights = load_file(folder / "step-00000004" / "model.safetensors")
    assert weights.keys() == state.model.state_dict().keys()
    for name, tensor in state.model.state_dict().items():
        assert torch.equal(tensor, weights[name])


def test_sha256sum_reads_the_checksums(saved):
    folder = saved[0] / "step-00000006"
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, check=True)
    names = {line.split("  ")[1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
    assert names | {"SHA256SUMS"} == {file.name for file in folder.iterdir()}


FILES = ["__0_0.distcp", ".metadata", "model.safetensors", "checkpoint.json", "SHA256SUMS"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["truncated", "altered", "missing", "empty"])
def test_damage_is_recognised_and_the_one_before_used(copy, file, damage, caplog):
    path = copy.paths()[-1] / file
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "altered":
        half = len(content) // 2
        path.write_bytes(content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :])
    else:
        path.write_bytes(content[: len(content) * 2 // 3] if damage == "truncated" else b"")
    assert copy.find().name == "step-00000004"
    (said,) = caplog.messages
    start = "CHECKPOINT DAMAGED AND PASSED OVER: checkpoint: "
    assert said.startswith(f"{start}{path.parent}")
    with pytest.raises(CheckpointError, match=rf"^checkpoint: {path.parent}"):
        copy.find(6)


def test_the_newest_intact_checkpoint_is_found(copy, caplog):
    for path in copy.paths()[1:]:
        (path / "__0_0.distcp").write_bytes(b"")
    assert copy.find().name == "step-00000002"
    assert len(caplog.messages) == 2
    (copy.paths()[0] / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"every one in .* is damaged"):
        copy.find()


def test_a_file_that_no_checksum_covers(copy, caplog):
    (copy.paths()[-1] / "__1_0.distcp").write_bytes(b"of another run")
    assert copy.find().name == "step-00000004"
    assert "SHA256SUMS is cut short: no __1_0.distcp" in caplog.text


def test_a_step_without_checkpoint(copy):
    with pytest.raises(CheckpointError, match=r"has none of step 5; there are: 2, 4, 6$"):
        copy.find(5)
    empty = Checkpoints(copy.folder / "nowhere", KEEP_ALL, "data")
    assert empty.find() is None
    with pytest.raises(CheckpointError, match=r"there are: none$"):
        empty.find(5)


def test_another_model_is_refused_with_its_keys(saved):
    dense = TrainState(runs.config(), CPU)
    before = {name: tensor.clone() for name, tensor in dense.model.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        load(saved[0] / "step-00000006", dense)
    message = str(error.value)
    assert "is of another model" in message
    assert "missing: branches.3.gate_up, branches.3.down.weight" in message
    assert "unknown: branches.3.routed.gate_up, branches.3.routed.down" in message
    assert " more" in message
    assert all(torch.equal(before[n], t) for n, t in dense.model.state_dict().items())


def test_another_shape_is_refused_with_both(saved):
    wide = TrainState(runs.with_experts(runs.config("residual")), CPU)
    with pytest.raises(CheckpointError, match=r"unknown: stack\.connections\.0\.maps\.bias"):
        load(saved[0] / "step-00000006", wide)
    three = replace(CONFIG, connection=replace(CONFIG.connection, streams=3))
    with pytest.raises(CheckpointError, match=r"maps\.bias \[24\] instead of \[15\]"):
        load(saved[0] / "step-00000006", TrainState(three, CPU))


def test_the_last_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=2), "data")
    state = TrainState(CONFIG, CPU)
    for loss in (3.0, 1.0, None, 2.0, None, 4.0):
        walk(state, 1)
        assert checkpoints.save(state, loss)
    assert [path.name[-1] for path in checkpoints.paths()] == ["2", "5", "6"]
    assert read_manifest(checkpoints.paths()[0]).validation_loss == 1.0
    assert not list(tmp_path.glob(".*")), "nothing is left of the others"


def test_saves_are_due_by_interval_and_as_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(every=50), "data")
    assert [checkpoints.is_due(s, best=False) for s in (49, 50, 51)] == [False, True, False]
    assert checkpoints.is_due(51, best=True)
    assert not Checkpoints(tmp_path, CheckpointConfig(best=False), "").is_due(51, best=True)


def test_checkpoints_of_later_steps_are_abandoned(copy):
    copy.abandon_after(2)
    assert [path.name for path in copy.paths()] == ["step-00000002"]
    assert sorted(path.name for path in copy.folder.iterdir())[1:] == [
        "step-00000004.abandoned",
        "step-00000006.abandoned",
    ]
    verify(copy.folder / "step-00000006.abandoned")


def test_an_existing_checkpoint_is_not_rewritten(copy):
    state = TrainState(CONFIG, CPU)
    path = copy.paths()[-1]
    load(path, state)
    before = (path / "SHA256SUMS").stat().st_mtime_ns
    assert copy.save(state)
    assert (path / "SHA256SUMS").stat().st_mtime_ns == before


def test_another_run_of_the_same_shape_is_refused(copy):
    seeded = replace(CONFIG, training=replace(CONFIG.training, seed=1))
    with pytest.raises(CheckpointError, match=r"is of a run with other training\.seed$"):
        load(copy.paths()[-1], TrainState(seeded, CPU))
    fewer = replace(CONFIG, connection=replace(CONFIG.connection, iterations=5))
    with pytest.raises(CheckpointError, match=r"is of a run with other connection\.iterations$"):
        load(copy.paths()[-1], TrainState(fewer, CPU))
    longer = replace(CONFIG, training=replace(CONFIG.training, steps=99))
    assert load(copy.paths()[-1], TrainState(longer, CPU)).step == 6


def test_a_checkpoint_with_the_name_of_another_step(copy):
    renamed = copy.paths()[-1].rename(copy.folder / "step-00000009")
    with pytest.raises(CheckpointError, match=r"step-00000009 is really that of step 6$"):
        load(renamed, TrainState(CONFIG, CPU))


@pytest.mark.parametrize("key", ["step", "sequences"])
def test_a_negative_position(copy, key):
    file = copy.paths()[-1] / "checkpoint.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: -1}))
    with pytest.raises(
        CheckpointError, match=rf"cannot be read: Expected `int` >= 0 - at `.\.{key}`"
    ):
        read_manifest(file.parent)


def test_a_checkpoint_without_optimizer_state(tmp_path):
    """Written before any step, with gradients: torch saves no optimizer state."""
    state, checkpoints = TrainState(CONFIG, CPU), Checkpoints(tmp_path, KEEP_ALL, "data")
    next(state.model.parameters()).sum().backward()
    checkpoints.write(state)
    with pytest.raises(CheckpointError, match=r"cannot be loaded: Missing key .* optimizer\."):
        load(checkpoints.find(), TrainState(CONFIG, CPU))


DEAD = [
    {"disable": ("pre", "post")},
    {"disable": ("pre", "post", "res")},
    {"disable": ("pre", "post"), "dynamic": False},
    {"kind": "hc", "disable": ("pre", "post", "res")},
    {"constraint": "identity", "disable": ("pre", "post"), "single_pass": True},
]


@pytest.mark.parametrize("connection", DEAD)
def test_a_run_with_untrained_parameters_resumes(tmp_path, connection):
    config = replace(runs.config(steps=4), connection=ConnectionConfig(**connection))
    short = replace(config, training=replace(config.training, steps=2))
    constant = OptimizerConfig(schedule="constant")
    for name, parts in (("parts", (short, config)), ("whole", (config,))):
        for part in parts:
            runs.train_or_resume(
                replace(part, optimizer=constant), runs.text(), tmp_path / name, ()
            )
    losses = [
        [record["loss"] for record in runs.figures(tmp_path / name) if record["event"] == "step"]
        for name in ("parts", "whole")
    ]
    assert len(losses[0]) == 4
    assert losses[0] == losses[1]


def test_moments_of_parameters_that_are_not_trainable_are_ignored(tmp_path):
    """Written by a version that trained all parameters: untrained ones have moments too."""
    dead = ConnectionConfig(disable=("pre", "post"))
    config = replace(runs.config(steps=4), connection=dead)
    wide = TrainState(config, CPU)
    wide.model.requires_grad_(True)
    wide.optimizer = optimizers.build(wide.model, config.optimizer)
    for parameter in wide.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    wide.optimizer.step()
    wide.step = 2
    checkpoints = Checkpoints(tmp_path, config.checkpoint, "digest")
    assert checkpoints.save(wide, wait=True)
    state = TrainState(config, CPU)
    load(checkpoints.find(), state)
    for found, wanted in zip(state.model.parameters(), wide.model.parameters(), strict=True):
        assert torch.equal(found, wanted)
        if found.requires_grad:
            moments = state.optimizer.state[found], wide.optimizer.state[wanted]
            assert torch.equal(*(each["exp_avg"] for each in moments))
        else:
            assert found not in state.optimizer.state
