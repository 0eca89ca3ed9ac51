"""`mhc train` under torchrun, its processes killed and started again."""

import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest

from manifold_hc.training import RunFolder
from tests.cli.test_commands import mhc
from tests.conftest import generated_text
from tests.parallel import drill

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_killed_processes_restart_with_the_same_losses(tmp_path):
    """One kill while a checkpoint is written, one at any time, one at the start."""
    text = tmp_path / "text.txt"
    text.write_text(generated_text(40_000))
    found = drill.drill(text, tmp_path, 60, ["starting", "running", "saving"], random.Random(0))
    assert found["same"]
    assert sum(found["kills"].values()) == 3
    assert RunFolder(tmp_path / "run").is_complete()
    said = (tmp_path / "log").read_text()
    assert said.count("going on from") >= 2
    assert said.count(f"run folder: {tmp_path / 'run'}") == 1


@linux
@pytest.mark.wide
def test_workers_save_and_end_when_torchrun_dies(tmp_path):
    text, folder, log = tmp_path / "text.txt", tmp_path / "run", tmp_path / "log"
    text.write_text(generated_text(40_000))
    agent = drill.start(text, folder, 100_000, 0, log, "parallel.timeout=4")
    drill.wait_until(lambda: drill.steps_of(folder) > 5, agent, log)
    left = drill.pids(agent)
    agent.kill()
    agent.wait()
    limit = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in left) and time.monotonic() < limit:
        time.sleep(0.1)
    assert time.monotonic() < limit
    said = log.read_text()
    assert "TORCHRUN IS GONE" in said
    assert "stopped by SIGTERM" in said
    assert f"go on with: torchrun --nproc-per-node 2 -m manifold_hc train --resume {folder}" in said


@linux
@pytest.mark.wide
def test_two_nodes_that_count_restarts_for_themselves(tmp_path):
    """Only the torchrun whose process has died counts it; the run goes on all the same."""
    text, folder = tmp_path / "text.txt", tmp_path / "run"
    text.write_text(generated_text(40_000))
    agents = drill.nodes(text, folder, 300, tmp_path)
    logs = [tmp_path / f"log of node {node}" for node in range(2)]
    try:
        drill.wait_until(lambda: drill.steps_of(folder) > 5, agents[1], logs[1])
        (other,) = drill.workers(agents[1]).values()
        os.kill(other, signal.SIGKILL)
        ended = [agent.wait(240) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
            agent.wait()
    said = "".join(log.read_text() for log in logs)
    assert ended == [0, 0], said[-6000:]
    assert RunFolder(folder).is_complete()
    assert "going on from" in said


def test_without_torchrun_nothing_starts(capfd, tmp_path):
    status, _, err = mhc(capfd, "train", "parallel.shard=2", "--out", tmp_path / "run")
    assert status == 2
    assert err.startswith("mhc: error: parallel: shard 2 needs 2 processes")
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()
    status, _, err = mhc(capfd, "compare", "parallel.shard=2", "--out", tmp_path / "run")
    assert status == 2
    assert "compare: trains in one process" in err
    assert (
        "--out: a run of several processes needs one" in mhc(capfd, "train", "parallel.shard=2")[2]
    )


def test_a_folder_of_another_run_is_refused_after_a_restart_too(tmp_path):
    """torchrun restarts the processes after any error."""
    text = tmp_path / "text.txt"
    text.write_text(generated_text(40_000))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "run" / ".job").write_text("another one's")
    agent = drill.start(text, tmp_path / "run", 4, 1, tmp_path / "log")
    assert agent.wait(240) == 1
    said = (tmp_path / "log").read_text()
    errors = [line for line in said.splitlines() if line.startswith("mhc")]
    assert len(errors) >= 2
    assert all("is not empty" in line for line in errors)
    assert (tmp_path / "run" / "config.json").read_text() == "{}"
