"""`mhc train` under torchrun, its processes killed and started again."""

import os
import random
import subprocess
import sys

import pytest

from manifold_hc.training import RunFolder
from tests.conftest import generated_text
from tests.parallel import drill

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_a_short_drill(tmp_path):
    """One kill while a checkpoint is written, one at any time, one at the start."""
    text = tmp_path / "text.txt"
    text.write_text(generated_text(40_000))
    found = drill.drill(text, tmp_path, 30, ["starting", "running", "saving"], random.Random(0))
    assert found["same"]
    assert sum(found["kills"].values()) == 3
    assert RunFolder(tmp_path / "run").is_complete()
    said = (tmp_path / "log").read_text()
    assert said.count("going on from") >= 2
    assert said.count(f"run folder: {tmp_path / 'run'}") == 1


def mhc(*arguments, processes=None):
    start = [sys.executable, "-m", "manifold_hc"]
    if processes:
        start[1:] = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        start += ["-m", "manifold_hc"]
    return subprocess.run(
        [*start, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_without_torchrun_nothing_starts(tmp_path):
    done = mhc("train", "parallel.shard=2", "--out", str(tmp_path / "run"))
    assert done.returncode == 2
    assert done.stderr.startswith("mhc: error: parallel: shard 2 needs 2 processes")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
    compared = mhc("compare", "parallel.shard=2", "--out", str(tmp_path / "run"))
    assert compared.returncode == 2
    assert "compare: trains in one process" in compared.stderr
    named = mhc("train", "parallel.shard=2")
    assert "--out: a run of several processes needs one" in named.stderr


def test_a_folder_of_another_run_is_refused_after_a_restart_too(tmp_path):
    """Torchrun starts the processes again whatever their error was."""
    text = tmp_path / "text.txt"
    text.write_text(generated_text(40_000))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "run" / ".job").write_text("another one's")
    command = drill.command(text, tmp_path / "run", 4, restarts=1)
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("mhc")]
    assert len(errors) >= 2
    assert all("is not empty" in line for line in errors)
    assert (tmp_path / "run" / "config.json").read_text() == "{}"
