"""Sharded runs give the golden run of one process with the same microbatches."""

from dataclasses import replace

import pytest
from safetensors.torch import load_file

from manifold_hc.config import ConnectionConfig
from tests.parallel.layouts import distributed, figures, layouts, run, run_all, with_microbatches
from tests.parallel.ranks import run_on_ranks
from tests.training import runs

RUNS = {
    "mhc": runs.config(),
    "hc": runs.config("hc"),
    "residual": runs.config("residual"),
    "bfloat16": runs.config(precision="bfloat16"),
    "recompute": runs.config(recompute=2),
    "experts": runs.with_experts(runs.config()),
    "single-pass": replace(runs.config(), connection=ConnectionConfig(single_pass=True)),
    "deepseek_v4": replace(runs.config(), connection=ConnectionConfig(numerics="deepseek_v4")),
}
NARROW = [{"shard": 2}, {"replicate": 2}, {"tensor": 2}]
WIDE = [
    {"shard": 4},
    {"replicate": 2, "shard": 2},
    {"shard": 2, "tensor": 2},
    {"replicate": 2, "tensor": 2},
]


def compare(folder, reference, rel=1e-5):
    wanted, found = figures(reference), figures(folder)
    assert len(found["losses"]) == 20
    for name, numbers in found.items():
        assert numbers == pytest.approx(wanted[name], rel=rel if name != "norms" else 20 * rel)
    names = ("model.safetensors", "checkpoints/step-00000020/model.safetensors")
    assert not (folder / names[1]).exists()
    weights, known = load_file(folder / names[0]), load_file(reference / names[0])
    assert weights.keys() == known.keys()
    # Adam makes full steps of a gradient that is rounding noise: single numbers may differ.
    distance = sum((weight - known[name]).square().sum() for name, weight in weights.items())
    assert distance < 1e-3 * sum(weight.square().sum() for weight in known.values())


@pytest.mark.parametrize("degrees", layouts(NARROW, WIDE))
def test_every_layout(degrees, tmp_path):
    config = distributed(runs.config(), **degrees)
    run_on_ranks(config.parallel.size, run, config, tmp_path / "together")
    run(with_microbatches(runs.config(), config.parallel.dp_size), tmp_path / "alone")
    compare(tmp_path / "together", tmp_path / "alone")


def test_attention_within_documents_of_sharded_sequences(tmp_path):
    run_on_ranks(2, run, distributed(runs.config(), tensor=2), tmp_path / "together", (), 900)
    run(runs.config(), tmp_path / "alone", (), 900)
    compare(tmp_path / "together", tmp_path / "alone")


@pytest.mark.parametrize(
    ("degrees", "kinds"),
    [
        ({"shard": 2}, ("bfloat16", "recompute", "experts")),
        pytest.param({"shard": 2}, tuple(RUNS), marks=pytest.mark.wide),
        pytest.param({"tensor": 2}, tuple(RUNS), marks=pytest.mark.wide),
    ],
    ids=["some, shard 2", "all, shard 2", "all, tensor 2"],
)
def test_every_kind_of_network(degrees, kinds, tmp_path):
    planned = {kind: distributed(RUNS[kind], **degrees) for kind in kinds}
    run_on_ranks(2, run_all, [(config, tmp_path / kind) for kind, config in planned.items()])
    for kind, config in planned.items():
        alone = with_microbatches(RUNS[kind], config.parallel.dp_size)
        run(alone, tmp_path / f"{kind} alone")
        narrow = config.training.precision == "bfloat16"
        compare(tmp_path / kind, tmp_path / f"{kind} alone", rel=1e-3 if narrow else 1e-5)
