"""`mhc.load`: runs of one and of several processes, exported models, and refusals."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from manifold_hc import training
from manifold_hc.config import ConnectionConfig
from manifold_hc.data import DataConfig
from manifold_hc.data.tokenizer import ByteTokenizer, tokenizer
from manifold_hc.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ManifoldError,
    RunFolderError,
)
from manifold_hc.interop.huggingface import Sampling, continue_texts, export, open_model
from manifold_hc.interop.loading import load
from manifold_hc.interop.trained import Loaded
from manifold_hc.models import AttentionConfig, Decoder, DecoderConfig, ExpertsConfig
from tests.parallel.layouts import distributed, run_all
from tests.parallel.ranks import run_on_ranks
from tests.training import runs

pytestmark = pytest.mark.usefixtures("unchecked")

MODEL = DecoderConfig(
    channels=16,
    blocks=2,
    feed_forward=16,
    attention=AttentionConfig(heads=2, head_size=8, rotary_size=4, latent_size=8),
    experts=ExpertsConfig(routed=2, active=1, width=16),
)


def config(data=None, **model):
    return training.RunConfig(
        model=replace(MODEL, **model),
        connection=ConnectionConfig(phi_std=0.1),
        data=replace(data or DataConfig(), sequence=16),
        training=training.TrainingConfig(steps=3, batch=2, validation_batches=1),
        checkpoint=training.CheckpointConfig(every=1, keep=3, best=False),
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of three steps, each with a checkpoint."""
    from tests.conftest import generated_text

    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text(generated_text(3_000))
    training.run(config(DataConfig(paths=(str(folder / "text.txt"),))), folder / "run")
    return folder / "run"


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the run that a test may damage."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture(scope="module")
def exported(finished):
    return export(finished, finished.parent / "exported")


def assert_weights(model, file, prefix=""):
    wanted, found = load_file(file), model.state_dict()
    assert {f"{prefix}{name}" for name in found} == wanted.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted[f"{prefix}{name}"]), name


def test_a_run_gives_its_newest_weights_and_its_tokenizer(finished):
    before = torch.get_rng_state()
    model, tokens = load(finished)
    assert isinstance(model, Decoder)
    assert not model.training
    assert isinstance(tokens, ByteTokenizer)
    assert tokens.decode(tokens.encode(["To é"])[0]) == "To é"
    assert_weights(model, finished / "model.safetensors")
    assert torch.equal(torch.get_rng_state(), before)
    assert load(finished).model is not model


def test_an_older_step(finished):
    model = load(finished, step=1).model
    assert_weights(model, finished / "checkpoints/step-00000001/model.safetensors")
    assert not torch.equal(model.head.weight, load(finished).model.head.weight)
    with pytest.raises(CheckpointError, match=r"has none of step 7; there are: 1, 2, 3"):
        load(finished, step=7)


def test_an_exported_model_gives_the_same(finished, exported):
    model, tokens = load(exported)
    assert_weights(model, exported / "model.safetensors", "decoder.")
    given = torch.tensor([tokens.encode(["To é"])[0].tolist()])
    assert given.tolist() == [list("To é".encode())]
    assert tokens.boundary == 0
    assert torch.equal(model(given), load(finished).model(given))
    with pytest.raises(ConfigError, match="without steps"):
        load(exported, step=1)


def test_a_run_and_its_export_write_the_same_text(finished, exported):
    made = []
    for folder in (finished, exported):
        model, tokens = open_model(folder)
        assert (model.generation_config.eos_token_id, tokens.eos_token_id) == (0, 0)
        made.append([*continue_texts(model, tokens, ["It é", "a"], Sampling(10, seed=2))])
    assert made[0] == made[1]


def test_runs_of_several_processes_are_read_whole(tmp_path):
    """Sharded, pipelined, tensor-parallel: the weights that the run gathers at its end."""
    base = runs.with_experts(runs.config(steps=2, accumulate=2))
    base = replace(base, model=replace(base.model, blocks=2))
    folders = []
    for degrees in ({"shard": 2}, {"pipeline": 2, "schedule": "1F1B"}, {"tensor": 2}):
        folders.append((distributed(base, **degrees), tmp_path / "-".join(degrees)))
    run_on_ranks(2, run_all, folders)
    for _, folder in folders:
        assert len(list(folder.glob("checkpoints/*/*.distcp"))) >= 2
        assert not list(folder.glob("checkpoints/*/model.safetensors"))
        assert_weights(load(folder).model, folder / "model.safetensors")


def test_a_run_keeps_its_tokenizer_when_its_data_are_gone(tmp_path, bpe, text_file):
    source = bpe(300)
    data = DataConfig(paths=(str(text_file),), tokenizer=str(source))
    training.run(config(data, vocabulary=400), tmp_path / "run")
    wanted = tokenizer(str(source))
    source.unlink()
    text_file.unlink()
    found = load(tmp_path / "run").tokenizer
    text = "aeio <|endoftext|> nrst"
    assert found.encode([text])[0].tolist() == wanted.encode([text])[0].tolist()
    assert (found.boundary, found.source) == (wanted.boundary, wanted.source)
    (tmp_path / "run/tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json cannot be read"):
        load(tmp_path / "run")
    values = json.loads((tmp_path / "run/config.json").read_text())
    values["data"]["tokenizer"] = ""
    (tmp_path / "run/config.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match=r"its data .*text\.txt are gone; name the tokenizer"):
        load(tmp_path / "run")


def test_a_damaged_checkpoint_is_passed_over(copy, caplog):
    weights = copy / "checkpoints/step-00000003/__0_0.distcp"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert_weights(load(copy).model, copy / "checkpoints/step-00000002/model.safetensors")
    assert "__0_0.distcp is truncated or altered" in caplog.text
    with pytest.raises(CheckpointError, match="truncated or altered"):
        load(copy, step=3)


def test_final_weights_serve_a_run_whose_checkpoints_are_all_damaged(copy, caplog):
    for weights in copy.glob("checkpoints/*/__0_0.distcp"):
        weights.write_bytes(weights.read_bytes()[:-100])
    assert_weights(load(copy).model, copy / "model.safetensors")
    assert "no checkpoint of" in caplog.text
    assert "is intact; model.safetensors is used" in caplog.text
    with pytest.raises(CheckpointError, match="truncated or altered"):
        load(copy, step=3)
    final = copy / "model.safetensors"
    final.write_bytes(final.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        load(copy)
    final.unlink()
    with pytest.raises(CheckpointError, match="is damaged; start the run again elsewhere"):
        load(copy)


def test_final_weights_serve_a_run_without_checkpoints(copy):
    shutil.rmtree(copy / "checkpoints")
    assert_weights(load(copy).model, copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no checkpoint yet; go on with: mhc train"):
        load(copy)


def test_a_configuration_of_another_model_is_named(copy):
    values = json.loads((copy / "config.json").read_text())
    values["model"]["feed_forward"] = 24
    (copy / "config.json").write_text(json.dumps(values))
    wanted = r"of another shape: branches\.1\.gate_up \[2, 16, 16\] instead of \[2, 24, 16\]"
    with pytest.raises(CheckpointError, match=wanted):
        load(copy)


def test_other_folders_are_refused(copy, tmp_path):
    for path, message in {
        tmp_path / "absent": "absent does not exist",
        copy / "config.json": "is not a folder",
        tmp_path: "has no config.json: it is neither a run",
        copy / "checkpoints/step-00000002": r"is one checkpoint; give its run, .*run, with step 2",
    }.items():
        with pytest.raises(RunFolderError, match=message):
            load(path)
    (tmp_path / "comparison.json").write_text("{}")
    shutil.copytree(copy, tmp_path / "mhc/seed-0")
    with pytest.raises(RunFolderError, match=r"is a comparison of 1 runs; .*mhc/seed-0"):
        load(tmp_path)
    (copy / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(RunFolderError, match="is a llama model of transformers; load it with"):
        load(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"config\.json is damaged"):
        load(copy)
    with pytest.raises(ConfigError, match="torch finds no mps"):
        load(copy.parent / "mhc/seed-0", device="mps")
    with pytest.raises(ConfigError, match="must be one of auto, cuda, mps, cpu but is 'tpu'"):
        load(copy.parent / "mhc/seed-0", device="tpu")


DAMAGES = {
    "missing": (lambda t: t.pop("decoder.norm.weight"), r"missing: decoder\.norm\.weight"),
    "extra": (lambda t: t.update(more=torch.ones(2)), "unknown: more"),
    "renamed": (
        lambda t: t.update({"decoder.norms.0.scale": t.pop("decoder.norms.0.weight")}),
        r"missing: decoder\.norms\.0\.weight; unknown: decoder\.norms\.0\.scale",
    ),
    "transposed": (
        lambda t: t.update({n: t[n].T.contiguous() for n in ["decoder.head.weight"]}),
        r"of another shape: decoder\.head\.weight \[16, 256\] instead of \[256, 16\]",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_an_exported_models_tensors_are_named(exported, tmp_path, name):
    damage, message = DAMAGES[name]
    folder = shutil.copytree(exported, tmp_path / "exported")
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_an_exported_models_files_are_checked(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "exported")
    values = json.loads((folder / "config.json").read_text())
    values["model"]["attention"]["heeds"] = 3
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"model\.attention\.heeds: is not a key .* mean heads"):
        load(folder)
    values["model"]["attention"].pop("heeds")
    values["connection"]["streams"] = 0
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"connection\.streams: must be at least 1"):
        load(folder)
    shutil.copy(exported / "config.json", folder)
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"has no .*model\.safetensors"):
        load(folder)


def test_an_exported_model_is_complete_or_absent(finished, tmp_path, monkeypatch):
    from transformers import PreTrainedTokenizerFast

    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").touch()
    with pytest.raises(RunFolderError, match="taken is not empty"):
        export(finished, tmp_path / "taken")

    def refuse(tokenizer, folder):
        assert (folder / "model.safetensors").exists()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", refuse)
    with pytest.raises(ManifoldError, match="out cannot be written: No space left"):
        export(finished, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    monkeypatch.undo()
    (tmp_path / "out").mkdir()  # an empty folder is no obstacle
    loaded = load(finished, step=2)
    assert isinstance(loaded, Loaded)
    made = export(loaded, tmp_path / "out")
    assert torch.equal(load(made).model.head.weight, loaded.model.head.weight)
    modes = {file.stat().st_mode for file in made.iterdir()}
    assert len(modes) == 1
