"""Runs of several processes that start from given weights."""

import json
from dataclasses import asdict, replace

import pytest
from safetensors.torch import load_file, save_file

from manifold_hc import training
from manifold_hc.config import ConnectionConfig
from manifold_hc.data import DataConfig
from manifold_hc.parallel import join_process_group
from manifold_hc.training import InitialWeights, RunFolder, check
from manifold_hc.training.state import TrainState
from manifold_hc.training.validation import validate
from manifold_hc.training.weight_search import find_weights
from tests.conftest import generated_text
from tests.parallel.layouts import CPU, distributed, layouts, with_microbatches
from tests.parallel.ranks import run_on_ranks
from tests.training import runs


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Configuration, run folder and export of a residual run with experts, of one process."""
    folder = tmp_path_factory.mktemp("source")
    text = folder / "text.txt"
    text.write_text(generated_text(40_000))
    config = runs.with_experts(runs.config("residual", steps=5))
    config = replace(
        config,
        model=replace(config.model, blocks=4),
        data=DataConfig(paths=(str(text),), sequence=32),
        optimizer=replace(config.optimizer, lr=0.02),
    )
    training.run(config, folder / "run")
    export = folder / "export"
    export.mkdir()
    description = {
        "model_type": "manifold_hc",
        "model": asdict(config.model),
        "connection": asdict(config.connection),
    }
    (export / "config.json").write_text(json.dumps(description))
    weights = load_file(folder / "run" / "model.safetensors")
    save_file({f"decoder.{name}": w for name, w in weights.items()}, export / "model.safetensors")
    return config, folder / "run", export


def started(config, paths):
    """Validation losses before the first step, and the gathered weights, for every source."""
    with join_process_group(config.parallel, CPU) as processes:
        answers = []
        for path in paths:
            weights = InitialWeights(find_weights(path))
            weights.require_fit(config)
            weights.verify(processes)
            state = TrainState(config, CPU, processes)
            weights.load(state)
            loss = validate(state, check(config, runs.text()).validation)
            answers.append((loss, {k: v.tolist() for k, v in state.weights().items()}))
        return answers


@pytest.mark.parametrize(
    "degrees",
    layouts(
        [{"shard": 2}, {"pipeline": 2, "schedule": "DualPipeV"}, {"shard": 2, "experts": 2}],
        [{"tensor": 2}, {"shard": 2, "tensor": 2}, {"shard": 4, "experts": 2}],
    ),
)
def test_shards_and_stages_get_their_parts_of_the_weights(source, degrees):
    config, run, export = source
    mhc = replace(config, connection=ConnectionConfig())
    here = distributed(with_microbatches(mhc, 4 if "pipeline" in degrees else 1), **degrees)
    answers = run_on_ranks(here.parallel.size, started, here, [run, export])
    wanted = load_file(run / "model.safetensors")
    for loss, weights in answers[0]:
        assert loss == pytest.approx(RunFolder(run).summary()["validation_loss"], rel=1e-5)
        assert wanted.keys() < weights.keys()
        assert all(wanted[name].tolist() == weights[name] for name in wanted)


def tuned(config, folder, init):
    training.run(config, folder, init=init)


def test_a_run_of_two_ranks_trains_as_one_process(source, tmp_path):
    config, run, _ = source
    config = replace(config, connection=ConnectionConfig())
    config = replace(config, training=replace(config.training, steps=3))
    run_on_ranks(2, tuned, distributed(config, shard=2), tmp_path / "two", run)
    tuned(config, tmp_path / "one", run)
    losses = {
        name: [r["loss"] for r in RunFolder(tmp_path / name).metrics() if r["event"] == "step"]
        for name in ("one", "two")
    }
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-5)
    record = json.loads((tmp_path / "two" / "run.json").read_text())["init"]
    assert (record["step"], record["connections"]) == (5, "new")
