"""Runs that start from given weights: equal losses, refusals, and resume without the weights."""

import doctest
import hashlib
import json
import os
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from manifold_hc import training
from manifold_hc.config import ConnectionConfig
from manifold_hc.data import DataConfig
from manifold_hc.errors import CheckpointError, ConfigError, DataError, RunFolderError
from manifold_hc.parallel import Processes
from manifold_hc.training import CheckpointConfig, InitialWeights, check, initial_config
from manifold_hc.training.checkpoint_files import path_step
from manifold_hc.training.state import TrainState
from manifold_hc.training.validation import validate
from manifold_hc.training.weight_search import find_weights
from tests.training import runs
from tests.training.runs import at_step, figures

CPU = torch.device("cpu")
KEEP_ALL = CheckpointConfig(every=3, keep=9)


def base(kind):
    config = runs.config(kind, steps=6, checkpoint=KEEP_ALL, validate_every=6, validation_batches=2)
    config = replace(config, optimizer=replace(config.optimizer, lr=0.02, warmup=1))
    return runs.with_experts(config)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    from tests.conftest import generated_text

    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(generated_text(40_000))
    return file


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text):
    """A function from a kind to (configuration, run folder) of a run with experts."""
    made = {}

    def train(kind):
        if kind not in made:
            config, folder = on(base(kind), text), tmp_path_factory.mktemp("source") / kind
            training.run(config, folder)
            made[kind] = config, folder
        return made[kind]

    return train


def on(config, text):
    return replace(config, data=DataConfig(paths=(str(text),), sequence=config.data.sequence))


def connected(config, **keys):
    return replace(config, connection=ConnectionConfig(**keys))


def start(config, path, **options):
    """The state of a run before its first step, and its validation loss."""
    weights = InitialWeights(find_weights(path), **options)
    weights.require_fit(config)
    state = TrainState(config, CPU)
    weights.load(state)
    return state, validate(state, check(config, runs.text()).validation)


def last_validation(folder):
    return [record["loss"] for record in figures(folder) if record["event"] == "validation"][-1]


@pytest.mark.parametrize(
    "keys",
    [
        {"kind": "residual"},
        {"kind": "hc"},
        {"kind": "mhc"},
        {"kind": "mhc", "constraint": "permutation", "streams": 3, "single_pass": True},
    ],
    ids=lambda keys: " ".join(map(str, keys.values())),
)
def test_a_residual_runs_weights_start_an_equal_run_of_any_kind(trained, keys):
    config, folder = trained("residual")
    state, loss = start(connected(config, **keys), folder)
    assert loss == pytest.approx(last_validation(folder), rel=1e-5)
    assert (state.step, state.sequences) == (0, 0)
    assert not state.optimizer.state
    _, random = start(connected(config, **keys), folder, drop_connections=True)
    assert random == loss
    untrained = validate(TrainState(config, CPU), check(config, runs.text()).validation)
    assert untrained > 1.01 * loss


@pytest.mark.parametrize("kind", ["hc", "mhc"])
def test_connections_and_balancing_biases_are_loaded(trained, kind):
    config, folder = trained(kind)
    state, loss = start(config, folder)
    assert loss == last_validation(folder)
    saved = load_file(folder / "model.safetensors")
    found = state.model.state_dict()
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], saved[name]) for name in saved)
    biases = [name for name in saved if name.endswith("router.bias")]
    assert biases
    assert all(saved[name].any() for name in biases)
    assert all(saved[name].any() for name in saved if name.endswith("3.maps.phi"))


def test_dropped_connections_have_their_initial_values(trained):
    config, folder = trained("mhc")
    other = connected(config, kind="mhc", streams=2)
    state, _ = start(other, folder, drop_connections=True)
    fresh, saved = TrainState(other, CPU).model.state_dict(), load_file(folder / WEIGHTS)
    for name, found in state.model.state_dict().items():
        assert torch.equal(found, (fresh if name.startswith("stack.") else saved)[name]), name
    residual, _ = start(connected(config, kind="residual"), folder, drop_connections=True)
    assert torch.equal(residual.model.head.weight, saved["head.weight"])


def test_the_newest_checkpoint_is_taken_or_another_by_step_or_path(trained, tmp_path):
    _, folder = trained("mhc")
    assert find_weights(folder).step == 6
    third = folder / "checkpoints" / "step-00000003"
    for found in (find_weights(folder, 3), find_weights(third)):
        assert (found.path, found.step) == (third, 3)
    copy = shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(copy / "checkpoints")
    assert find_weights(copy).step is None
    _, loss = start(trained("mhc")[0], copy)
    assert loss == last_validation(folder)


def test_a_checkpoint_is_found_under_any_name(trained, tmp_path, monkeypatch):
    config, folder = trained("mhc")
    checkpoint = folder / "checkpoints" / "step-00000006"
    lone = shutil.copytree(checkpoint, tmp_path / "lone")
    for step in (None, 6):
        assert find_weights(lone, step).step == 6
    with pytest.raises(ConfigError, match="lone is one checkpoint; leave the step 3 out"):
        find_weights(lone, 3)
    _, loss = start(config, lone)
    assert loss == last_validation(folder)
    InitialWeights(find_weights(lone)).verify(Processes())
    with pytest.raises(CheckpointError, match="lone is not named step-N; give the run that"):
        path_step(lone)
    monkeypatch.chdir(checkpoint)
    assert find_weights(".").step == 6


def test_the_tokenizer_of_a_checkpoint_is_that_of_its_own_run(text, tmp_path, bpe, monkeypatch):
    file = bpe(280)
    config, source = with_tokenizer(runs.config(steps=1), file, text), tmp_path / "source"
    training.run(config, source)
    checkpoint = source / "checkpoints" / "step-00000001"
    (tmp_path / "link").symlink_to(checkpoint)
    monkeypatch.chdir(source / "checkpoints")
    for path in (checkpoint, "step-00000001", tmp_path / "link"):
        found = find_weights(path).data.tokenizer
        assert found == str(source / "tokenizer.json")
    shutil.copytree(checkpoint, tmp_path / "lone")
    shutil.copy(bpe(290), tmp_path / "tokenizer.json")
    monkeypatch.chdir(tmp_path)
    assert find_weights("lone").data.tokenizer == str(file)


WEIGHTS = "model.safetensors"


@pytest.fixture
def export(trained, tmp_path):
    """An exported model; its two files are written again by `write`."""
    config, folder = trained("mhc")
    path = tmp_path / "export"
    path.mkdir()
    description = {
        "model_type": "manifold_hc",
        "model": asdict(config.model),
        "connection": asdict(config.connection),
    }
    (path / "config.json").write_text(json.dumps(description))
    tensors = {f"decoder.{k}": v for k, v in load_file(folder / WEIGHTS).items()}
    save_file(tensors, path / WEIGHTS)
    return path


def test_an_exported_model_in_one_file_or_two(trained, export):
    config, folder = trained("mhc")
    found = initial_config(export)
    assert (found.model, found.connection) == (config.model, config.connection)
    assert start(config, export)[1] == last_validation(folder)
    digest = hashlib.sha256((export / WEIGHTS).read_bytes()).hexdigest()
    assert InitialWeights(find_weights(export)).origin["sha256"] == digest

    tensors = load_file(export / WEIGHTS)
    (export / WEIGHTS).unlink()
    parts = {"a.safetensors": sorted(tensors)[::2], "b.safetensors": sorted(tensors)[1::2]}
    for file, names in parts.items():
        save_file({name: tensors[name] for name in names}, export / file)
    index = {name: file for file, names in parts.items() for name in names}
    index_file = export / f"{WEIGHTS}.index.json"
    index_file.write_text(json.dumps({"weight_map": index}))
    assert start(config, export)[1] == last_validation(folder)
    index_file.write_text(json.dumps({"weight_map": index | {"decoder.norm.weight": "../a"}}))
    with pytest.raises(CheckpointError, match=r"points to \.\./a, outside its folder"):
        start(config, export)


def changed(tensors, name, how):
    if how == "missing":
        del tensors[name]
    elif how == "unknown":
        tensors[f"{name}.more"] = tensors[name].clone()
    elif how == "transposed":
        tensors[name] = tensors[name].T.contiguous()
    elif how == "integers":
        tensors[name] = tensors[name].to(torch.int64)
    elif how == "unprefixed":
        tensors[name.removeprefix("decoder.")] = tensors.pop(name)
    return tensors


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"is of another model; missing: stack\.connections\.2\.maps\.phi"),
        ("unknown", r"unknown: stack\.connections\.2\.maps\.phi\.more"),
        ("transposed", r"of another shape: stack\..*phi \[128, 24\] instead of \[24, 128\]"),
        ("integers", r"decoder\.stack\..*phi in .* has the dtype I64"),
        ("unprefixed", r"stack\..*phi in .* is no tensor of the decoder"),
    ],
)
def test_other_tensors_of_an_export_are_named(trained, export, tmp_path, how, message):
    config, _ = trained("mhc")
    tensors = load_file(export / WEIGHTS)
    save_file(changed(tensors, "decoder.stack.connections.2.maps.phi", how), export / WEIGHTS)
    with pytest.raises(CheckpointError, match=message):
        training.run(config, tmp_path / "new", init=export)
    assert not (tmp_path / "new").exists()


def test_a_file_that_is_no_safetensors_is_refused(trained, export):
    torch.save({"decoder.norm.weight": torch.ones(2)}, export / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        start(trained("mhc")[0], export)
    (export / WEIGHTS).unlink()
    os.mkfifo(export / WEIGHTS)
    with pytest.raises(CheckpointError, match="is not a regular file"):
        start(trained("mhc")[0], export)


@pytest.mark.parametrize(
    ("section", "keys", "message"),
    [
        ("model", {"channels": 48}, r"model\.channels: is 48 but the weights of .* have 32"),
        ("model", {"blocks": 4}, r"model\.blocks: is 4 but .* have 2"),
        ("connection", {"kind": "residual"}, r"connection\.kind: is residual but .* have mhc"),
        ("connection", {"kind": "hc"}, r"connection\.kind: is hc but .* have mhc; .*drop_conn"),
        ("connection", {"streams": 2}, r"connection\.streams: is 2 but .* have 4"),
        (
            "connection",
            {"constraint": "identity"},
            r"connection\.constraint: is identity but .* have sinkhorn",
        ),
        ("connection", {"disable": ("pre",)}, r"connection\.disable: is pre but .* have none"),
        ("connection", {"single_pass": True}, r"connection\.exit: is pre but .* have mean"),
        ("connection", {"exit": "sum"}, r"connection\.exit: is sum but .* have mean"),
    ],
)
def test_other_sizes_and_connections_are_refused(trained, tmp_path, section, keys, message):
    config, folder = trained("mhc")
    other = replace(config, **{section: replace(getattr(config, section), **keys)})
    with pytest.raises(ConfigError, match=message):
        training.run(other, tmp_path / "new", init=folder)
    assert not (tmp_path / "new").exists()


def test_keys_that_only_shift_the_outputs_are_allowed_with_a_warning(trained, caplog):
    config, folder = trained("mhc")
    caplog.clear()
    start(replace(config, connection=replace(config.connection, iterations=5)), folder)
    assert "connection.iterations differs from that of the initial weights" in caplog.text
    caplog.clear()
    free = replace(config.connection, alpha=0.5, backend="reference")
    start(replace(config, connection=free), folder)
    assert "differs" not in caplog.text


def test_weights_that_are_missing_or_damaged_are_refused(trained, tmp_path):
    config, folder = trained("mhc")
    copy = shutil.copytree(folder, tmp_path / "copy")
    with pytest.raises(CheckpointError, match="no checkpoint of step 2; there are: 3, 6"):
        find_weights(copy, 2)
    (tmp_path / "comparison.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds several runs; give one"):
        find_weights(tmp_path)
    with pytest.raises(ConfigError, match="absent does not exist; give a run folder"):
        find_weights(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty has no weights; give a run folder"):
        find_weights(tmp_path / "empty")
    with pytest.raises(ConfigError, match=f"is a file; give the folder that holds it, {copy}$"):
        find_weights(copy / WEIGHTS)
    weights = copy / "checkpoints" / "step-00000006" / "__0_0.distcp"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(
        CheckpointError, match=f"altered; step 3 is intact: --init {copy} --step 3$"
    ):
        training.run(config, tmp_path / "new", init=copy)
    (weights.parent / "checkpoint.json").write_text("{")
    with pytest.raises(CheckpointError, match=f"read.*; step 3 is intact: --init {copy} --step 3$"):
        find_weights(copy)
    older = copy / "checkpoints" / "step-00000003" / "__0_0.distcp"
    older.write_bytes(older.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"__0_0.distcp is truncated or altered$"):
        training.run(config, tmp_path / "new", init=older.parent)
    with pytest.raises(CheckpointError, match=r"checkpoint.json cannot be read: [^;]*$"):
        find_weights(copy)
    assert not (tmp_path / "new").exists()
    (copy / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="a model of type llama, not manifold_hc"):
        find_weights(copy)
    shutil.rmtree(copy / "checkpoints")
    shutil.copy(folder / "config.json", copy)
    (copy / WEIGHTS).unlink()
    with pytest.raises(ConfigError, match="has no checkpoint yet"):
        find_weights(copy)


def with_tokenizer(config, file, *paths):
    return replace(
        config,
        model=replace(config.model, vocabulary=300),
        data=replace(config.data, tokenizer=str(file), paths=tuple(map(str, paths))),
    )


def test_another_tokenizer_is_refused_before_the_text_is_read(text, tmp_path, bpe):
    first, second = bpe(280), bpe(290)
    config, source = with_tokenizer(runs.config(steps=1), first, text), tmp_path / "source"
    training.run(config, source)
    copy = source / "tokenizer.json"
    assert initial_config(source).data == DataConfig(tokenizer=str(copy))
    first.unlink()
    for name in ("bytes", second):
        other = with_tokenizer(config, name, tmp_path / "absent.txt")
        with pytest.raises(DataError, match=f"another tokenizer .* give data.tokenizer={copy}"):
            training.run(other, tmp_path / "new", init=source)
    training.run(with_tokenizer(config, copy, text), tmp_path / "tuned", init=source)
    assert (tmp_path / "tuned" / "tokenizer.json").read_bytes() == copy.read_bytes()


def test_weights_without_their_tokenizer_need_a_given_one(text, tmp_path, bpe, caplog):
    file = bpe(280)
    config, source = with_tokenizer(runs.config(steps=1), file, text), tmp_path / "source"
    training.run(config, source)
    moved = file.rename(tmp_path / "moved.json")
    (source / "tokenizer.json").unlink()
    assert initial_config(source).data == DataConfig()
    final = shutil.copytree(source, tmp_path / "final")
    shutil.rmtree(final / "checkpoints")
    on_bytes = replace(config, data=DataConfig(paths=(str(text),)))
    reason = f"is not known .*{file} cannot be read.*; give data.tokenizer=FILE"
    for folder in (source, final):
        with pytest.raises(DataError, match=reason):
            training.run(on_bytes, tmp_path / "new", init=folder)
        for name in (moved, "bytes"):
            caplog.clear()
            InitialWeights(find_weights(folder)).require_fit(with_tokenizer(config, name, text))
            assert "is not known, only the size of its vocabulary is checked" in caplog.text


def test_a_run_that_names_a_lost_tokenizer_needs_one_whatever_its_vocabulary(
    trained, text, tmp_path
):
    config, folder = trained("residual")
    copy = shutil.copytree(folder, tmp_path / "copy")
    file = copy / "checkpoints" / "step-00000006" / "checkpoint.json"
    file.write_text(file.read_text().replace('"tokenizer": ""', '"tokenizer": "gone.json"'))
    with pytest.raises(DataError, match=r"gone.json cannot be read.*; give data.tokenizer=FILE"):
        InitialWeights(find_weights(copy)).require_fit(config)


def test_an_export_without_a_tokenizer_is_one_of_bytes_only_with_their_vocabulary(
    trained, export, caplog
):
    config, _ = trained("mhc")
    InitialWeights(find_weights(export)).require_fit(config)
    assert "is not known, only the size of its vocabulary is checked" in caplog.text
    file = export / "config.json"
    file.write_text(file.read_text().replace('"vocabulary": 256', '"vocabulary": 300'))
    larger = replace(config, model=replace(config.model, vocabulary=300))
    with pytest.raises(DataError, match=r"no tokenizer.json, model.vocabulary=300\); give data"):
        InitialWeights(find_weights(export)).require_fit(larger)


def test_an_export_brings_its_tokenizer(trained, export, tmp_path, bpe):
    shutil.copy(bpe(280), export / "tokenizer.json")
    assert initial_config(export).data.tokenizer == str(export / "tokenizer.json")
    with pytest.raises(DataError, match=r"another tokenizer .* than the text, bytes"):
        training.run(trained("mhc")[0], tmp_path / "new", init=export)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_a_model_exported_for_transformers_starts_an_equal_run(text, tmp_path, bpe, tokenizer):
    huggingface = pytest.importorskip("manifold_hc.interop.huggingface")
    file = bpe(280) if tokenizer == "bpe" else "bytes"
    config, source = with_tokenizer(runs.config(steps=2), file, text), tmp_path / "source"
    training.run(config, source)
    folder = huggingface.export(source, tmp_path / "exported")
    found = initial_config(folder).data.tokenizer
    assert found == ("" if tokenizer == "bytes" else str(folder / "tokenizer.json"))
    for name, init in {"from run": source, "from export": folder}.items():
        training.run(config, tmp_path / name, init=init, observers=[at_step(-1, None)])
    assert figures(tmp_path / "from run") == figures(tmp_path / "from export")


def test_other_keys_of_an_export_are_named(export):
    file = export / "config.json"
    content = json.loads(file.read_text())
    content["model"]["experts"]["routes"] = 3
    file.write_text(json.dumps(content))
    with pytest.raises(
        ConfigError, match=r"config\.json: model\.experts\.routes is not known here"
    ):
        find_weights(export)
    content["model"]["channels"] = "many"
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"config\.json: model: Expected `int`"):
        find_weights(export)


class Killed(Exception):
    pass


def test_a_run_killed_in_its_first_step_resumes_without_the_initial_weights(
    trained, tmp_path, text
):
    config, folder = trained("residual")
    source = shutil.copytree(folder, tmp_path / "source")
    config = connected(replace(config, checkpoint=KEEP_ALL), kind="mhc")
    config = replace(config, training=replace(config.training, seed=5, probe_every=1))

    def kill(model):
        raise Killed

    with pytest.raises(Killed):
        training.run(config, tmp_path / "killed", init=source, observers=[at_step(0, kill)])
    shutil.rmtree(source)
    record = json.loads((tmp_path / "killed" / "run.json").read_text())
    digest = hashlib.sha256((folder / "checkpoints/step-00000006/SHA256SUMS").read_bytes())
    assert record["init"] == {
        "path": str(source / "checkpoints" / "step-00000006"),
        "step": 6,
        "sha256": digest.hexdigest(),
        "connections": "new",
    }
    training.run(config, tmp_path / "killed", resume="newest", observers=[at_step(-1, None)])
    training.run(config, tmp_path / "calm", init=folder, observers=[at_step(-1, None)])
    assert figures(tmp_path / "killed") == figures(tmp_path / "calm")
    resumed = json.loads((tmp_path / "killed" / "run.json").read_text())
    assert resumed["init"] == record["init"]
    first = figures(tmp_path / "calm")[0]["loss"]
    assert first < last_validation(folder) + 0.5  # not the loss of random weights, 5.5


def test_processes_that_torchrun_restarts_go_on_without_reading_the_weights_again(
    trained, tmp_path, monkeypatch
):
    config, folder = trained("mhc")
    source, run = shutil.copytree(folder, tmp_path / "source"), tmp_path / "run"
    config = replace(config, training=replace(config.training, probe_every=1))

    def kill(model):
        raise Killed

    with pytest.raises(Killed):
        training.run(config, run, init=source, observers=[at_step(0, kill)])
    training.RunFolder(run).set_job("job 7")  # as a run of several processes does
    (source / "checkpoints" / "step-00000006" / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match="__0_0"):
        training.run(config, run, init=source)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 7")
    training.run(config, run, init=source, observers=[at_step(-1, None)])
    training.run(config, tmp_path / "calm", init=folder, observers=[at_step(-1, None)])
    assert figures(run) == figures(tmp_path / "calm")


def test_initial_weights_that_cannot_be_saved_end_the_run_before_it_begins(
    trained, tmp_path, monkeypatch
):
    config, folder = trained("mhc")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training.checkpoint.Checkpoints, "write", full)
    with pytest.raises(RunFolderError, match=r"initial weights cannot be saved .*No space left"):
        training.run(config, tmp_path / "new", init=folder)
    assert training.RunFolder(tmp_path / "new").is_new()


def test_init_and_resume_exclude_each_other(trained, tmp_path):
    config, folder = trained("mhc")
    with pytest.raises(ConfigError, match="leave one out"):
        training.run(config, folder, resume="newest", init=folder)
    with pytest.raises(ConfigError, match="drop_connections: belongs to init"):
        training.run(config, tmp_path / "new", drop_connections=True)


def test_the_default_configuration_has_only_the_models_keys(trained):
    config, folder = trained("hc")
    expected = training.RunConfig(model=config.model, connection=config.connection)
    assert initial_config(folder, 3) == expected


@pytest.mark.parametrize("function", [training.find_weights, initial_config])
def test_examples_run(function, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = doctest.DocTestFinder(recurse=False).find(function, function.__name__)
    report = []
    failed, tried = doctest.DocTestRunner(verbose=False).run(example, out=report.append)
    assert (failed, tried > 0) == (0, True), "".join(report)
