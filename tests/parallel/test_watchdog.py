"""A process that hangs ends the run, by name."""

import logging
import os
import signal
import time

import pytest
import torch.distributed as dist

from manifold_hc.parallel.watchdog import STATUS, Progress, describe
from tests.parallel.layouts import distributed, run
from tests.parallel.ranks import ProcessEnded, outcomes
from tests.training import runs
from tests.training.runs import at_step


def sleep(model):
    if dist.get_rank() == 1:
        time.sleep(1000)


def stop(model):
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)


def hanging(how, config, folder):
    handler = logging.FileHandler(folder / f"log of {os.environ['RANK']}")
    logging.getLogger("manifold_hc").addHandler(handler)
    run(config, folder / "run", [at_step(3, how)])


@pytest.mark.parametrize("how", [sleep, stop])
def test_a_hanging_rank_is_named_with_its_operation(how, tmp_path):
    config = distributed(runs.config(probe_every=1), shard=2, timeout=4.0)
    start = time.monotonic()
    found = outcomes(2, hanging, how, config, tmp_path)
    assert time.monotonic() - start < 60
    statuses = [ended.args[0] for ended in found if isinstance(ended, ProcessEnded)]
    assert STATUS in statuses
    said = "".join(file.read_text() for file in tmp_path.glob("log of *"))
    assert "A PROCESS HANGS, nothing has moved for 4 s" in said
    assert "rank 1 is behind at" in said
    if how is sleep:
        assert "rank 1 is behind at 'step 3, stability figures'" in said
    assert "rank 0 is behind" not in said


def test_ranks_behind_are_named():
    far, near = Progress(7, "step 3, update", 100.0), Progress(6, "sublayer 2", 60.0)
    assert describe([far, near]) == ("rank 1 is behind at 'sublayer 2', last heard of 40 s ago")
    assert describe([far, None, near]) == "rank 1 has not begun"
    both = describe([near, far, near])
    assert both.startswith("rank 0 is behind")
    assert "; rank 2 is behind" in both
