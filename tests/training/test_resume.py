"""Runs that are killed or stopped and resumed equal uninterrupted runs."""

import os
import random
import signal
import time
from dataclasses import replace

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from manifold_hc.config import ConnectionConfig
from manifold_hc.errors import (
    CheckpointError,
    ConfigError,
    DivergedError,
    RunFolderError,
    StoppedError,
)
from manifold_hc.training import CheckpointConfig, Checkpoints, OptimizerConfig, RunFolder
from manifold_hc.training import trainer as trainer_module
from manifold_hc.training.checkpoint_files import read_manifest
from tests.training import runs
from tests.training.runs import at_step, figures, forkserver, train_or_resume

STEPS = 60
KILLS = 20
KILLED = runs.with_experts(
    runs.config(
        steps=STEPS,
        probe_every=5,
        checkpoint=CheckpointConfig(every=3, best=False),
    )
)


def train_in_child(folder):
    train_or_resume(KILLED, runs.text(documents=90), folder)


def test_killed_at_twenty_steps_and_during_saves_it_prints_the_same_losses(tmp_path):
    def start(name):
        child = forkserver().Process(target=train_in_child, args=(tmp_path / name,))
        child.start()
        return child

    calm = start("calm")
    calm.join()
    assert calm.exitcode == 0

    draw = random.Random(0)
    folder = RunFolder(tmp_path / "killed")
    during_saves = 0
    for number, step in enumerate(sorted(draw.sample(range(1, STEPS - 3), KILLS))):
        child = start("killed")
        while steps_of(folder) < step and child.is_alive():
            time.sleep(0.001)
        if number % 2:
            while child.is_alive() and not half_written(folder):
                time.sleep(0.0005)
            time.sleep(draw.uniform(0, 0.01))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        during_saves += bool(half_written(folder))
    assert during_saves >= 5

    last = start("killed")
    last.join()
    assert last.exitcode == 0
    assert figures(folder.path) == figures(tmp_path / "calm")
    assert not half_written(folder)
    for file in ("model.safetensors", "checkpoints/step-00000060/__0_0.distcp"):
        assert (folder.path / file).read_bytes() == (tmp_path / "calm" / file).read_bytes()


def steps_of(folder):
    file = folder.metrics_file
    return file.read_bytes().count(b'"event":"step"') if file.exists() else 0


def half_written(folder):
    return list(folder.checkpoints.glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_resumes(tmp_path, number):
    config = runs.config(probe_every=1)
    before = signal.getsignal(number)
    stop = at_step(6, lambda model: os.kill(os.getpid(), number))
    with pytest.raises(StoppedError, match=f"stopped by {number.name} after 7 steps") as error:
        train_or_resume(config, runs.text(), tmp_path / "stopped", [stop])
    assert (error.value.step, error.value.signal, error.value.saved) == (7, number, True)
    assert signal.getsignal(number) is before
    train_or_resume(config, runs.text(), tmp_path / "stopped", [at_step(-1, None)])
    train_or_resume(config, runs.text(), tmp_path / "calm", [at_step(-1, None)])
    assert figures(tmp_path / "stopped") == figures(tmp_path / "calm")


def test_a_second_ctrl_c_does_not_wait(tmp_path):
    def twice(model):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    # A shell makes its background jobs, such as these tests, ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train_or_resume(
                runs.config(probe_every=1), runs.text(), tmp_path / "run", [at_step(3, twice)]
            )
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("every", [4, 7])
def test_every_token_of_an_epoch_is_seen_once_across_a_resume(tmp_path, monkeypatch, every):
    """An epoch of 41 sequences in steps of 4, stopped after 3 and 6 steps."""
    corpus = runs.text()
    corpus = type(corpus)([corpus.sources[0][:1400]], 256)
    seen, steps = [], trainer_module.take_step

    def watched(state, batch, config):
        seen.append((state.step, batch.targets.clone()))
        return steps(state, batch, config)

    monkeypatch.setattr(trainer_module, "take_step", watched)
    config = runs.config(
        steps=11, probe_every=1, validate_every=11, checkpoint=CheckpointConfig(every=every)
    )
    for step in (2, 2, None):
        stop = at_step(
            step if step is not None else -1, lambda _: os.kill(os.getpid(), signal.SIGTERM)
        )
        try:
            train_or_resume(config, corpus, tmp_path, [stop])
        except StoppedError:
            assert step is not None
    assert [step for step, _ in seen] == list(range(11))
    targets = torch.cat([t.flatten() for _, t in seen])
    targets = targets[targets >= 0]
    training = corpus.split(32, config.data.validation)[0].sources[0]
    assert sorted(targets[: len(training) - 1].tolist()) == sorted(
        training.read(1, len(training)).tolist()
    )


def test_losses_do_not_depend_on_checkpoints(tmp_path):
    for name, every in (("often", 1), ("never", 100)):
        train_or_resume(
            runs.config(checkpoint=CheckpointConfig(every=every)), runs.text(), tmp_path / name
        )
    assert figures(tmp_path / "often") == figures(tmp_path / "never")


def test_a_complete_run_can_be_made_longer(tmp_path):
    short, long = (runs.config(steps=n, validate_every=4) for n in (8, 12))
    short, long = (
        replace(c, optimizer=OptimizerConfig(schedule="constant")) for c in (short, long)
    )
    train_or_resume(short, runs.text(), tmp_path / "grown", [])
    with pytest.raises(RunFolderError, match="holds a complete run"):
        train_or_resume(short, runs.text(), tmp_path / "grown", [])
    train_or_resume(long, runs.text(), tmp_path / "grown", [])
    train_or_resume(long, runs.text(), tmp_path / "whole", [])
    assert figures(tmp_path / "grown") == figures(tmp_path / "whole")
    assert RunFolder(tmp_path / "grown").summary()["steps"] == 12


def test_a_loss_that_is_not_finite(tmp_path):
    """A weight becomes infinite after step 4: step 5 names it, and nothing infinite is saved."""

    def break_it(model):
        model.branches[2].query.weight.data[0, 0] = float("inf")

    config = runs.config(probe_every=1, checkpoint=CheckpointConfig(every=3))
    with pytest.raises(DivergedError) as error:
        train_or_resume(config, runs.text(), tmp_path, [at_step(4, break_it)])
    assert str(error.value) == (
        "train: loss is not finite at step 5, first in parameter group 'layers' "
        "(output of branches.2.query)"
    )
    assert error.value.__notes__ == ["the last finite state is saved as step 3"]
    assert Checkpoints(tmp_path / "checkpoints", config.checkpoint, "").find().name[-1] == "3"


def test_a_loss_that_is_not_finite_with_untrained_parameters(tmp_path):
    def break_it(model):
        model.branches[2].query.weight.data[0, 0] = float("inf")

    every = ConnectionConfig(disable=("pre", "post", "res"))
    config = replace(runs.config(probe_every=1), connection=every)
    with pytest.raises(DivergedError, match=r"group 'layers' \(output of branches\.2\.query\)"):
        train_or_resume(config, runs.text(), tmp_path, [at_step(1, break_it)])


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite(tmp_path, bad):
    """The state before the step is finite: it is saved, and the run resumes from it."""

    def break_it(model):
        model.stack.connections[1].maps.bias.register_hook(lambda g: g * bad)

    config = runs.config(probe_every=1)
    with pytest.raises(DivergedError) as error:
        train_or_resume(config, runs.text(), tmp_path / "broken", [at_step(4, break_it)])
    assert str(error.value) == (
        "train: gradient norm is not finite at step 5, first in parameter group "
        "'connections, vectors' (stack.connections.1.maps.bias, 1 of 8 tensors)"
    )
    assert error.value.__notes__ == ["the last finite state is saved as step 5"]
    train_or_resume(config, runs.text(), tmp_path / "broken", [at_step(-1, None)])
    train_or_resume(config, runs.text(), tmp_path / "calm", [at_step(-1, None)])
    assert figures(tmp_path / "broken") == figures(tmp_path / "calm")


def test_a_run_that_fails_in_its_first_step_can_start_again(tmp_path):
    """The seed reproduces its state: no checkpoint is needed."""
    config = runs.config()
    wild = replace(config, model=replace(config.model, init_std=1e30))
    for _ in range(2):
        with pytest.raises(DivergedError, match="at step 0, first in parameter group") as error:
            train_or_resume(wild, runs.text(), tmp_path, [])
        assert error.value.__notes__ == ["the last finite state is not saved"]


def test_a_run_that_diverges_drops_none_of_its_checkpoints(tmp_path):
    """The state it failed in is finite, but may be beyond repair."""

    def break_it(model):
        model.stack.connections[1].maps.bias.register_hook(lambda g: g * float("inf"))

    keep = CheckpointConfig(every=4, keep=1, best=False)
    config = runs.config(probe_every=1, checkpoint=keep)
    for steps_until_then in (4, 0):
        with pytest.raises(DivergedError) as error:
            train_or_resume(config, runs.text(), tmp_path, [at_step(steps_until_then, break_it)])
    assert error.value.__notes__ == [
        "the last finite state is saved as step 6",
        "before it there is step 5",
    ]
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep, "")
    assert [path.name[-1] for path in checkpoints.paths()] == ["4", "5", "6"]


def test_fewer_steps_than_the_checkpoint_has_are_refused(tmp_path):
    train_or_resume(
        runs.config(steps=8, checkpoint=CheckpointConfig(every=3)), runs.text(), tmp_path, []
    )
    (tmp_path / "summary.json").unlink()
    before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    for steps in (7, 3):
        with pytest.raises(ConfigError, match=r"training\.steps: must be above 8, .* but is"):
            train_or_resume(runs.config(steps=steps), runs.text(), tmp_path, [])
    assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before
    train_or_resume(runs.config(steps=8), runs.text(), tmp_path, [])
    assert RunFolder(tmp_path).is_complete(), "killed between its checkpoint and its summary"


def test_missing_metrics_are_logged(tmp_path, caplog):
    train_or_resume(runs.config(steps=8), runs.text(), tmp_path, [])
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_bytes(b"".join(metrics.read_bytes().splitlines(keepends=True)[3:]))
    train_or_resume(runs.config(steps=10), runs.text(), tmp_path, [])
    assert "metrics.jsonl lacks 3 of the 8 steps before the checkpoint" in caplog.text


def test_a_ctrl_c_inside_a_save_is_a_ctrl_c(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise CheckpointException("save", {0: (KeyboardInterrupt(), None)})

    monkeypatch.setattr("manifold_hc.training.checkpoint.save_tensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_or_resume(runs.config(steps=2), runs.text(), tmp_path, [])


def test_a_checkpoint_on_other_data_is_refused(tmp_path):
    config = runs.config(steps=3)
    train_or_resume(config, runs.text(), tmp_path, [])
    before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    other = type(runs.text())([runs.text().sources[0][1:]], 256)
    longer = runs.config(steps=6)
    with pytest.raises(CheckpointError, match="was made on other data"):
        train_or_resume(longer, other, tmp_path, [])
    assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before
    assert read_manifest(tmp_path / "checkpoints" / "step-00000003").sequences == 12
