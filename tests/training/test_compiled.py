"""Compiled branches give the same losses."""

import pytest
import torch

from manifold_hc.training import RunFolder, train
from tests.training import runs
from tests.training.runs import in_process

COMPILED = runs.with_experts(runs.config(steps=4, compile=True, validate_every=4))


def compiled(folder):
    """Number of graphs: attention and feed-forward, in training and in validation."""
    train(COMPILED, runs.text(), RunFolder(folder))
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_a_compiled_run_has_the_same_losses(tmp_path):
    graphs, _ = in_process(compiled, tmp_path / "compiled")
    assert isinstance(graphs, int), graphs
    assert graphs >= 6, "attention, dense feed-forward and shared experts, with and without grad"
    train(
        runs.with_experts(runs.config(steps=4, validate_every=4)),
        runs.text(),
        RunFolder(tmp_path / "eager"),
    )
    found, wanted = (losses(tmp_path / name) for name in ("compiled", "eager"))
    assert len(found) == 5
    assert found == pytest.approx(wanted, rel=1e-5)


def losses(folder):
    return [record["loss"] for record in RunFolder(folder).metrics() if "loss" in record]
