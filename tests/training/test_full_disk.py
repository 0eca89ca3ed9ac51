"""A full disk loses only the files that do not fit on it.

A limit on the file size simulates it. The limit holds for a whole process, so each test runs in its
own: pytest's output may be a file too.
"""

import logging
import os
import resource
import signal
import sys
import time

import pytest
import torch

from manifold_hc import files
from manifold_hc.cli.terminal import log_to_stderr
from manifold_hc.files import retry_write
from manifold_hc.training import CheckpointConfig, Checkpoints, RunFolder, train
from manifold_hc.training.checkpoint_files import WRITE_ERRORS, save_weights
from manifold_hc.training.state import TrainState
from tests.training import runs
from tests.training.runs import at_step, figures, in_process, train_or_resume


def limit(size):
    """No file of this process may grow past `size` bytes; None lifts that."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size is None else size, hard))


def full(step, size):
    return at_step(step, lambda _: limit(size))


def calm(config, folder):
    train(config, runs.text(), RunFolder(folder), [at_step(-1, None), at_step(-1, None)])


KEEP = CheckpointConfig(every=4, keep=9, best=False)
CHECKPOINTS = runs.config(steps=20, probe_every=1, checkpoint=KEEP)


def no_room_for_checkpoints(folder):
    train_or_resume(CHECKPOINTS, runs.text(), folder, [full(5, 90_000), full(16, None)])


def test_a_failed_save_is_retried_and_losses_are_unchanged(tmp_path):
    """From step 5 no file may pass 90 kB; from step 16 on there is room again."""
    _, messages = in_process(no_room_for_checkpoints, tmp_path / "full")
    run = RunFolder(tmp_path / "full")
    there = [path.name for path in Checkpoints(run.checkpoints, KEEP, "").paths()]
    assert there == ["step-00000004", "step-00000018", "step-00000020"]
    errors = [message for message in messages if "NOT SAVED" in message]
    assert [message.partition(":")[0] for message in errors] == [
        f"CHECKPOINT NOT SAVED at step {step}" for step in (8, 12, 16)
    ]
    assert "torch could not write a file whole, as on a full disk" in errors[0]
    assert "tries again at step 18" in errors[1]
    assert not list(run.checkpoints.glob(".*"))
    calm(CHECKPOINTS, tmp_path / "calm")
    assert figures(run.path) == figures(tmp_path / "calm")


def due_after_a_failure(folder):
    checkpoints = Checkpoints(folder, CheckpointConfig(every=50), "data")
    state = TrainState(CHECKPOINTS, torch.device("cpu"))
    planned = [checkpoints.is_due(step, best=False) for step in (9, 10, 11)]
    limit(1000)
    saved = checkpoints.save(state)
    return planned, saved, [checkpoints.is_due(step, best=False) for step in (9, 10, 11)]


def test_a_failed_save_is_due_again(tmp_path):
    planned, saved, after = in_process(due_after_a_failure, tmp_path)[0]
    assert planned == [False, False, False]
    assert not saved
    assert after == [False, True, True]


def no_room_for_weights(folder):
    limit(1000)
    try:
        save_weights({"w": torch.ones(1000)}, folder / "weights")
    except WRITE_ERRORS:
        return "recognised"


def test_weights_that_do_not_fit_are_recognised(tmp_path):
    assert in_process(no_room_for_weights, tmp_path)[0] == "recognised"


METRICS = runs.config(steps=12, probe_every=1)


def no_room_for_metrics(folder):
    return train(METRICS, runs.text(), RunFolder(folder), [full(3, 1000), full(9, None)])


def test_metrics_are_held_on_a_full_disk(tmp_path):
    summary, messages = in_process(no_room_for_metrics, tmp_path / "full")
    calm(METRICS, tmp_path / "calm")
    assert figures(tmp_path / "full") == figures(tmp_path / "calm")
    assert summary == RunFolder(tmp_path / "full").summary()
    assert sum("METRICS CANNOT BE WRITTEN" in message for message in messages) == 1


def no_room_for_tensorboard(folder):
    config = runs.config(steps=20, probe_every=1, tensorboard=True)
    train_or_resume(
        config, runs.text(), folder, [full(3, 2000), full(18, None), lambda probe: Slow()]
    )


class Slow:
    """An observer with many numbers, which waits for TensorBoard's thread to write them."""

    name = "slow"
    shown: dict[str, str] = {}  # noqa: RUF012

    def __call__(self, model):
        time.sleep(0.05)
        return {str(number): 1.0 for number in range(200)}


def test_tensorboard_is_given_up_and_the_run_is_not(tmp_path):
    _, messages = in_process(no_room_for_tensorboard, tmp_path)
    assert any("TENSORBOARD CANNOT BE WRITTEN" in message for message in messages)
    assert RunFolder(tmp_path).is_complete()


def no_room_for_what_is_printed(folder):
    """As in `mhc train > log 2>&1`, with the log on the full disk too."""
    sys.stderr = sys.stdout = (folder / "log").open("w", buffering=1)
    log_to_stderr()
    config = runs.config(steps=60, probe_every=1)
    train_or_resume(config, runs.text(), folder / "run", [full(0, 50), full(58, None)])


def test_a_log_on_a_full_disk_does_not_stop_the_run(tmp_path):
    """A line is due after 50 steps, and one as soon as the metrics cannot be written."""
    said, _ = in_process(no_room_for_what_is_printed, tmp_path)
    assert said is None
    assert RunFolder(tmp_path / "run").is_complete()


def room_as_soon_as_it_is_missed(folder):
    files.WAIT = 0.001
    _when("THE WEIGHTS CANNOT BE WRITTEN", lambda: limit(None))
    train_or_resume(METRICS, runs.text(), folder, [full(3, 20_000)])


def test_the_last_checkpoint_waits_for_room_too(tmp_path):
    """The disk is full when the run ends, and has room after the first error of the weights."""
    _, messages = in_process(room_as_soon_as_it_is_missed, tmp_path)
    assert any("CHECKPOINT NOT SAVED at step 12" in message for message in messages)
    found = Checkpoints(tmp_path / "checkpoints", METRICS.checkpoint, "").find()
    assert found.name == "step-00000012"
    assert RunFolder(tmp_path).is_complete()


def stopped_while_it_waits(folder):
    _when("CANNOT BE WRITTEN", lambda: os.kill(os.getpid(), signal.SIGTERM))
    train_or_resume(METRICS, runs.text(), folder, [full(3, 20_000)])


def test_a_signal_ends_the_wait_for_room(tmp_path):
    said, _ = in_process(stopped_while_it_waits, tmp_path)
    assert said == (
        "StoppedError: train: stopped by SIGTERM after 12 steps; ITS CHECKPOINT COULD NOT BE SAVED"
    )
    assert not RunFolder(tmp_path).is_complete()


def _when(text, do):
    handler = logging.Handler()
    handler.emit = lambda record: do() if text in record.getMessage() else None
    logging.getLogger("manifold_hc").addHandler(handler)


def test_the_end_of_a_run_waits_for_room(monkeypatch, caplog):
    monkeypatch.setattr("manifold_hc.files.WAIT", 0.001)
    monkeypatch.setattr("manifold_hc.files.PATIENCE", 0.003)
    calls = []

    def write(fails):
        calls.append(1)
        if len(calls) <= fails:
            raise OSError(28, "No space left on device")

    retry_write(lambda: write(2), "the weights", lambda: False)
    assert caplog.text.count("THE WEIGHTS CANNOT BE WRITTEN: No space left on device") == 2
    calls.clear()
    with pytest.raises(OSError, match="No space left"):
        retry_write(lambda: write(99), "the weights", lambda: False)
    assert len(calls) == 4
    calls.clear()
    with pytest.raises(OSError, match="No space left"):
        retry_write(lambda: write(99), "the weights", lambda: len(calls) == 2)
    assert len(calls) == 2
