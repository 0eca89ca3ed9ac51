"""`mhc bench step`: its arithmetic by hand, and a run at toy size."""

import json

import pytest

from manifold_hc.bench import parts, peers
from manifold_hc.bench.step import MHC, RESIDUAL, _blocks
from manifold_hc.training import preset
from tests.cli.test_commands import mhc


def test_a_step_is_the_sum_of_its_parts(step_result):
    assert step_result.kinds == [RESIDUAL, MHC]
    assert step_result.full_step() == 1 + 5 + 4 + 11 * 4 + 10 * 2
    assert step_result.added(MHC) == 0.5 + 0.5 + 5.5 * 1 + 5.5 * 3
    assert step_result.overhead(MHC) == 23 / 74
    low, high = step_result.overhead_range(MHC)
    assert low == (0.5 + 0.5 + 22) / 74
    assert high == (0.5 + 1.25 + 22) / 74
    assert step_result.overhead_without_optimizer(MHC) == 23 / 54
    assert step_result.added(RESIDUAL) == 0


def test_blocks_stand_for_the_whole_depth():
    assert list(_blocks(preset("3b").model)) == [
        ("dense block", False, 1),
        ("expert block 1", True, 5.5),
        ("expert block 2", True, 5.5),
    ]
    assert list(_blocks(preset("tiny").model)) == [("dense block", False, 12)]


def test_a_transformer_block_has_the_shapes_of_the_preset():
    import torch

    with torch.device("meta"):
        branches = parts.block(preset("3b").model, True, "meta")
    shapes = {name: tuple(p.shape) for name, p in branches.named_parameters()}
    assert shapes["1.1.routed.gate_up"] == (64, 1280, 2 * 896)
    assert shapes["1.1.routed.down"] == (64, 896, 1280)
    assert shapes["1.1.shared.down.weight"] == (1280, 2 * 896)


@pytest.mark.usefixtures("unchecked")
def test_a_small_run(capfd, tmp_path):
    file = tmp_path / "step.json"
    options = ["--preset", "tiny-moe", "--tokens", "64", "--rounds", "2", "--json", file]
    status, out, _ = mhc(capfd, "bench", "step", *options)
    assert status == 0
    for shown in ("embedding", "head and loss", "expert block 2", "optimizer", "overhead of mhc"):
        assert shown in out
    assert "overhead of transformers" in out
    record = json.loads(file.read_text())
    assert [step["problem"]["dtype"] for step in record["step"]] == ["float32", "bfloat16"]
    assert record["step"][0]["overhead"].keys() == {"residual", "mhc", "transformers"}


@pytest.mark.usefixtures("unchecked")
def test_a_missing_peer(capfd, monkeypatch):
    def missing(problem):
        raise ImportError("No module named 'transformers'")

    monkeypatch.setattr(parts, "transformers", missing)
    options = ["bench", "step", "--preset", "tiny", "--tokens", "16", "--rounds", "1"]
    status, out, err = mhc(capfd, *options, "--dtype", "float32")
    assert status == 1
    assert "missing: transformers: No module named 'transformers'" in out
    assert "overhead of mhc" in out
    assert "bench step: wanted every peer, got none of transformers" in err
    assert mhc(capfd, *options, "--dtype", "float32", "--allow-missing")[0] == 0


def test_a_peer_that_is_not_installed_is_reported_before_any_work(capfd, monkeypatch):
    def build(model, problem):
        raise AssertionError("nothing is built")

    monkeypatch.setattr(parts, "embedding_task", build)
    monkeypatch.setattr(peers, "PEERS", (peers.Peer("transformers", build),))
    monkeypatch.setattr(peers.Peer, "version", None)
    status, out, err = mhc(capfd, "bench", "step", "--preset", "tiny")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "bench step: wanted every peer, got none of transformers; pip install" in err
