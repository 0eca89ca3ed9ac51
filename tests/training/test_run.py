"""`training.run`: start, resume and refusals from Python, as from the command line."""

import json
import os
import signal
from dataclasses import replace

import pytest

from manifold_hc import training
from manifold_hc.data import DataConfig
from manifold_hc.errors import CheckpointError, ConfigError, RunFolderError, StoppedError
from manifold_hc.training import CheckpointConfig, RunFolder
from tests.training import runs
from tests.training.runs import at_step, figures


@pytest.fixture
def config(text_file):
    base = runs.config(steps=4, probe_every=1, checkpoint=CheckpointConfig(every=2))
    return replace(base, data=replace(base.data, paths=(str(text_file),)))


def files(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def longer(config, steps):
    return replace(config, training=replace(config.training, steps=steps))


def test_a_run_leaves_its_summary_and_the_command_of_its_process(config, tmp_path):
    summary = training.run(config, tmp_path / "run")
    assert summary == RunFolder(tmp_path / "run").summary()
    assert summary["steps"] == 4
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert len(record["commands"]) == 1
    assert not RunFolder(tmp_path / "run").is_new()


def test_a_stopped_run_resumes_with_the_same_losses(config, tmp_path):
    stop = at_step(2, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(StoppedError, match="after 3 steps") as error:
        training.run(config, tmp_path / "stopped", observers=[stop])
    assert error.value.__notes__ == [f"go on with: mhc train --resume {tmp_path / 'stopped'}"]
    training.run(config, tmp_path / "stopped", resume="newest", observers=[at_step(-1, None)])
    training.run(config, tmp_path / "calm", observers=[at_step(-1, None)])
    assert figures(tmp_path / "stopped") == figures(tmp_path / "calm")


def test_a_run_resumes_from_a_given_step(config, tmp_path):
    run = tmp_path / "run"
    training.run(config, run)
    wanted = figures(run)
    training.run(longer(config, 5), run, resume=2)
    assert figures(run)[:2] == wanted[:2]
    assert RunFolder(run).summary()["steps"] == 5
    assert (run / "checkpoints" / "step-00000004.abandoned").exists()


def test_refusals_leave_the_folder_unchanged(config, tmp_path):
    with pytest.raises(RunFolderError, match="no run has begun there"):
        training.run(config, tmp_path / "run", resume="newest")
    training.run(config, tmp_path / "run")
    before = files(tmp_path / "run")
    other_seed = replace(config, training=replace(config.training, seed=1))
    other_text = replace(longer(config, 5), data=DataConfig(sequence=32))
    for refused, resume, error, message in (
        (config, None, RunFolderError, "is not empty; choose another"),
        (config, "newest", RunFolderError, "holds a complete run of 4 steps"),
        (other_seed, "newest", ConfigError, "training.seed cannot change in a run"),
        (longer(config, 5), 3, CheckpointError, "has none of step 3; there are: 2, 4"),
        (other_text, "newest", CheckpointError, "was made on other data"),
    ):
        with pytest.raises(error, match=message):
            training.run(refused, tmp_path / "run", resume=resume)
        assert files(tmp_path / "run") == before


@pytest.mark.parametrize("resume", ["latest", "3", True, False, 2.0])
def test_an_invalid_resume_raises(config, resume, tmp_path, unchecked):
    with pytest.raises(ConfigError, match='resume must be None, "newest" or the step'):
        training.run(config, tmp_path / "run", resume=resume)
    assert not (tmp_path / "run").exists()
