import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.multiprocessing.reductions import StorageWeakRef

from manifold_hc.config import block_length
from manifold_hc.data import Batches, Corpus
from manifold_hc.diagnostics import GainMonitor
from manifold_hc.errors import BackendError, ConfigError, DataError, DivergedError, RunFolderError
from manifold_hc.files import write_atomically
from manifold_hc.models import AttentionConfig, Decoder, DecoderConfig
from manifold_hc.training import OptimizerConfig, RunFolder, TrainingConfig, train
from manifold_hc.training.device import find_device
from manifold_hc.training.folder import SUMMARY, locked
from manifold_hc.training.state import TrainState
from manifold_hc.training.step import loss_of, take_step
from tests import golden
from tests.conftest import generated_text
from tests.training import runs

IDS = np.frombuffer(generated_text(40_000).encode(), dtype=np.uint8)
TEXT = Corpus.of(IDS)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run").mkdir()
    return RunFolder(tmp_path / "run")


def small(kind="mhc", **training):
    config = golden.config(kind)
    return replace(config, training=replace(config.training, **training))


def test_a_run_leaves_everything_it_measured(folder):
    summary = train(small(steps=25, probe_every=10), TEXT, folder, [GainMonitor])
    assert summary == folder.summary()
    assert folder.is_complete()
    assert folder.config() == small(steps=25, probe_every=10)
    records = folder.metrics()
    steps = [r for r in records if r["event"] == "step"]
    assert [r["step"] for r in steps] == list(range(25))
    assert set(steps[0]) >= {"loss", "gradient_norm", "lr", "seconds", "tokens_per_second"}
    assert [r["step"] for r in records if r["event"] == "validation"] == [9, 19, 24]
    assert [r["step"] for r in records if r["event"] == "gain"] == [0, 10, 20, 24]
    assert 10**7 < summary["peak_memory"] < 10**11
    assert summary["largest_gradient_norm"] == max(r["gradient_norm"] for r in steps)
    assert summary["validation_loss"] == records[-1 - 1]["loss"]
    assert records[-1]["composite_log_column_sum"]


def test_a_complete_run_is_not_written_over(folder):
    train(small(steps=1), TEXT, folder)
    before = {f: f.read_bytes() for f in folder.path.rglob("*") if f.is_file()}
    with pytest.raises(RunFolderError, match="holds a complete run"):
        train(small(steps=1), TEXT, folder)
    assert {f: f.read_bytes() for f in folder.path.rglob("*") if f.is_file()} == before


def test_the_saved_weights_are_the_trained_ones(folder):
    config = small(steps=12, validation_batches=1)
    summary = train(config, TEXT, folder)
    model = Decoder(config.model, config.connection)
    model.load_state_dict(load_file(folder.model_file))
    held_out = TEXT.split(32, config.data.validation)[1]
    loss = loss_of(model, Batches(held_out, 32, 4, config.training.seed)[0]).item()
    assert loss == pytest.approx(summary["validation_loss"], rel=1e-6)


def test_observers_do_not_change_the_run(tmp_path):
    def losses(name, observers):
        run = RunFolder(tmp_path / name)
        run.path.mkdir()
        train(small(probe_every=1), TEXT, run, observers)
        return [r["loss"] for r in run.metrics() if r["event"] == "step"]

    assert losses("watched", [GainMonitor]) == losses("alone", [])


def test_training_learns(folder):
    train(small(steps=60), TEXT, folder)
    losses = [r["loss"] for r in folder.metrics() if r["event"] == "step"]
    assert losses[-1] < 0.6 * losses[0]


def test_clipping_limits_the_step_not_the_reported_norm(tmp_path):
    norms = []
    for name, clip in (("clipped", 1e-3), ("free", 0.0)):
        run = RunFolder(tmp_path / name)
        run.path.mkdir()
        config = replace(small(steps=1), optimizer=OptimizerConfig(clip=clip))
        norms.append(train(config, TEXT, run)["largest_gradient_norm"])
    assert norms[0] == norms[1] > 1e-3


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(folder):
    config = replace(small("hc", steps=60), optimizer=OptimizerConfig(lr=1e30, warmup=0, clip=0.0))
    with pytest.raises(DivergedError, match=r"(loss|gradient norm) is not finite at step \d+") as e:
        train(config, TEXT, folder)
    records = folder.metrics()
    assert not folder.is_complete()
    assert [r["step"] for r in records if r["event"] == "step"] == list(range(e.value.step))


def test_nothing_is_written_for_a_text_too_short(folder):
    with pytest.raises(DataError):
        train(small(), Corpus.of(IDS[:50]), folder)
    with pytest.raises(DataError, match=r"has 301 ids but model\.vocabulary is 256"):
        train(small(), Corpus.of(np.full(5000, 300)), folder)
    assert not list(folder.path.iterdir())


def test_equal_data_for_every_kind(tmp_path):
    """Weights, batch and function are equal at step 0, and so is the loss."""
    first = []
    for kind in golden.KINDS:
        run = RunFolder(tmp_path / kind)
        run.path.mkdir()
        train(small(kind, steps=1), TEXT, run)
        first.append(run.metrics()[0]["loss"])
    assert first == pytest.approx([first[0]] * 3, rel=1e-6)


def test_a_metrics_line_cut_short_by_a_crash_is_left_out(folder):
    folder.records.append({"event": "validation", "step": 0, "loss": 1.0})
    with folder.metrics_file.open("ab") as file:
        file.write(b'{"event": "ste')
    assert folder.metrics() == [{"event": "validation", "step": 0, "loss": 1.0}]


STEP = {"event": "step", "step": 0, "loss": None, "gradient_norm": 1, "seconds": 0.5}
DAMAGED = [
    *({**STEP, key: value} for key in STEP for value in ([0], True, {"0": 0})),
    STEP | {"step": "0"},
    STEP | {"loss": "0"},
    *({k: v for k, v in STEP.items() if k != key} for key in STEP),
    STEP | {"step": None},
    STEP | {"step": 0.5},
]


@pytest.mark.parametrize("line", ["[1]", "{", "\xff", *map(json.dumps, DAMAGED)])
def test_a_damaged_line_in_the_middle_is_named(folder, line):
    folder.metrics_file.write_text(f"{json.dumps(STEP)}\n{line}\n", encoding="latin-1")
    with pytest.raises(RunFolderError, match=r"l is damaged: line 2[: ].*; delete line 2$"):
        folder.metrics()


FIGURES = dict.fromkeys(sorted(SUMMARY), 1.0)


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "{}", '{"diverged_at": "3"}', '{"diverged_at": null}'),
        *(json.dumps(FIGURES | {key: "1"}) for key in FIGURES),
        *(json.dumps({k: v for k, v in FIGURES.items() if k != key}) for key in FIGURES),
    ],
)
def test_a_damaged_summary_is_named(folder, content):
    folder.summary_file.write_text(content)
    with pytest.raises(RunFolderError, match=r"summary\.json is damaged: .*; delete it, and mhc "):
        folder.summary()


def test_numbers_that_are_not_finite_are_null_in_the_metrics(folder):
    folder.records.append({"gain": float("inf"), "list": [float("nan"), 1.0]})
    assert json.loads(folder.metrics_file.read_text()) == {"gain": None, "list": [None, 1.0]}


def test_a_folder_can_be_held_once(tmp_path):
    held, again = locked(tmp_path / "run"), locked(tmp_path / "run")
    with held, pytest.raises(RunFolderError, match="in use"), again:
        pass
    with locked(tmp_path / "run"):
        pass
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(RunFolderError, match="cannot be made or written"),
        locked(tmp_path / "file"),
    ):
        pass


def test_a_folder_without_a_valid_config_is_named(folder):
    with pytest.raises(RunFolderError, match=r"has no config\.json"):
        folder.config()
    for content, message in (
        ("{}}", "is damaged: .*; put a copy of it back, or start another run with --out$"),
        ('{"training": 3}', "is not valid: .*; put a copy of it back"),
        ("{}", "has other keys"),
        ('{"modell": {}}', "has other keys"),
    ):
        folder.config_file.write_text(content)
        with pytest.raises(RunFolderError, match=message):
            folder.config()


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "file"
    write_atomically(file, "old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        write_atomically(file, "new")
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TrainingConfig(steps=0), "steps: must be at least 1"),
        (lambda: TrainingConfig(seed=-1), "seed: must be from 0"),
        (lambda: TrainingConfig(device="tpu"), "device: must be"),
        (lambda: OptimizerConfig(lr=0.0), "lr: must be a number above 0"),
        (lambda: OptimizerConfig(lr=float("nan")), "lr: must be a number above 0"),
        (lambda: TrainingConfig(seed=2**32), "seed: must be from 0 to 4294967295"),
        (lambda: DecoderConfig(norm_eps=float("nan")), "norm_eps: must be a number from 0 on"),
        (lambda: DecoderConfig(init_std=-1.0), "init_std: must be a number from 0 on"),
        (lambda: AttentionConfig(theta=0.0), "theta: must be a number above 0"),
        (lambda: OptimizerConfig(betas=(0.9, 1.0)), "betas"),
        (lambda: OptimizerConfig(eps=-1.0), "eps: must be a number from 0 on"),
        (lambda: OptimizerConfig(schedule="linear"), "schedule"),
    ],
)
def test_values_that_cannot_be_used(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


def test_devices():
    assert find_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="torch finds no cuda here"):
            find_device("cuda")


def test_microbatches_give_the_losses_of_the_whole_batch(tmp_path):
    """Also at the end of an epoch, where microbatches have different numbers of targets."""
    losses = {}
    corpus = Corpus([TEXT.sources[0][:1400]], 256)
    for pieces in (1, 2, 4):
        run = RunFolder(tmp_path / str(pieces))
        train(small(accumulate=pieces), corpus, run)
        losses[pieces] = [r["loss"] for r in run.metrics() if r["event"] == "step"]
    assert losses[2] == pytest.approx(losses[1], rel=2e-4)
    assert losses[4] == pytest.approx(losses[1], rel=2e-4)


def test_microbatches_give_the_gradient_norm_of_the_whole_batch(tmp_path):
    """The last step of an epoch: one whole sequence and one of a few tokens."""
    states = []
    for pieces in (1, 2):
        config = replace(small(accumulate=pieces, batch=2), optimizer=OptimizerConfig(clip=0.0))
        state = TrainState(config, torch.device("cpu"))
        corpus = Corpus([TEXT.sources[0][: 3 * 32 + 6]], 256)
        batches = Batches(corpus, 32, 2, 0)
        state.sequences = 2
        batch = batches.take(2, 2)
        assert (batch.targets != -100).sum(1).tolist() == [32, 5]
        states.append((take_step(state, batch, config), state.model.state_dict()))
    assert states[0][0].loss == pytest.approx(states[1][0].loss, rel=1e-6)
    assert states[0][0].gradient_norm == pytest.approx(states[1][0].gradient_norm, rel=1e-5)


def test_bfloat16_trains_and_keeps_its_weights_in_float32(tmp_path):
    losses = {}
    for precision in ("float32", "bfloat16"):
        run = RunFolder(tmp_path / precision)
        train(runs.with_experts(small(steps=40, precision=precision)), TEXT, run)
        losses[precision] = [r["loss"] for r in run.metrics() if r["event"] == "step"]
        assert all(t.dtype == torch.float32 for t in load_file(run.model_file).values())
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)


def test_tensorboard_gets_the_same_figures(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(small(tensorboard=True, probe_every=5), TEXT, folder, [GainMonitor])
    found = EventAccumulator(str(folder.path / "tensorboard"))
    found.Reload()
    for event, key in (("step", "loss"), ("validation", "loss"), ("gain", "gain_backward")):
        wanted = [(r["step"], r[key]) for r in folder.metrics() if r["event"] == event]
        scalars = [(s.step, s.value) for s in found.Scalars(f"{event}/{key}")]
        assert [step for step, _ in scalars] == [step for step, _ in wanted]
        assert [v for _, v in scalars] == pytest.approx([v for _, v in wanted], rel=1e-6)


def test_missing_tensorboard_is_refused_before_training(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'manifold-hc\[tensorboard\]'"):
        train(small(tensorboard=True), TEXT, folder)
    assert not list(folder.path.iterdir())


def test_an_unsupported_backend_is_refused_before_training(folder):
    """Kernels are compiled by then: processes must not wait for it in a collective."""
    config = runs.config()
    config = replace(config, connection=replace(config.connection, backend="triton"))
    with pytest.raises(BackendError, match='backend "triton"'):
        train(config, runs.text(), folder)
    assert not list(folder.path.iterdir())


def test_experts_leave_their_load(folder):
    train(runs.with_experts(small(probe_every=4, steps=9)), TEXT, folder)
    records = [r for r in folder.metrics() if r["event"] == "experts"]
    assert [r["step"] for r in records] == [0, 4, 8]
    for record in records:
        assert [sum(layer) for layer in record["load"]] == [4 * 32 * 2]
        assert record["largest_load"] == max(record["load"][0]) / (4 * 32 * 2 / 4)
        assert record["smallest_load"] == min(record["load"][0]) / (4 * 32 * 2 / 4)
        assert record["dropped_tokens"] == 0


def test_documents_reach_the_model(tmp_path):
    """Document masks change the losses of a text of many documents only."""

    def losses(documents, mask):
        config = small(steps=4)
        config = replace(config, data=replace(config.data, mask_documents=mask))
        run = RunFolder(tmp_path / f"{documents}-{mask}")
        train(config, runs.text(documents), run)
        return [r["loss"] for r in run.metrics() if r["event"] == "step"]

    plain = losses(900, False)
    assert losses(1, True) == losses(1, False) == plain
    assert losses(900, True) != plain


def test_the_first_res_is_not_trained(folder):
    """Unchanged to the bit by the trainer's optimizer, while all others change."""
    config = small(steps=10)
    train(config, TEXT, folder)
    torch.manual_seed(config.training.seed)
    before = Decoder(config.model, config.connection).state_dict()
    after = load_file(folder.model_file)
    for sublayer in range(config.model.sublayers):
        name = f"stack.connections.{sublayer}.maps"
        unmoved = [
            torch.equal(before[f"{name}.{part}"][first:], after[f"{name}.{part}"][first:])
            for part, first in (("bias", 8), ("phi", 8), ("alpha", 2))
        ]
        assert unmoved == 3 * [sublayer == 0]


@pytest.mark.parametrize("kind", ["mhc", "residual"])
def test_recompute_changes_no_figure(tmp_path, kind):
    """Nor need a run that goes on keep it."""
    plain = runs.with_experts(runs.config(kind, steps=4, accumulate=2))
    found = []
    for name, before, after in (
        ("none", "none", "none"),
        ("auto", "auto", "auto"),
        ("three", 3, 3),
        ("other", "auto", "none"),
    ):
        for steps, recompute in ((2, before), (4, after)):
            training = replace(plain.training, steps=steps, recompute=recompute)
            constant = OptimizerConfig(schedule="constant")  # which does not look at `steps`
            config = replace(plain, training=training, optimizer=constant)
            runs.train_or_resume(config, runs.text(), tmp_path / name)
        found.append([r["loss"] for r in runs.figures(tmp_path / name) if r["event"] == "step"])
    assert len(found[0]) == 4
    assert all(losses == found[0] for losses in found)


def test_recompute_holds_less_in_a_decoder():
    config = runs.config()
    tokens = torch.randint(256, (2, 32))
    held = {}
    for recompute in (None, "auto"):
        model = Decoder(config.model, config.connection, recompute)
        alive = []
        for connection in model.stack.connections:
            connection.maps.register_forward_hook(
                lambda *a, to=alive: to.append(StorageWeakRef(a[2].x.untyped_storage()))
            )
        logits = model(tokens)
        held[recompute] = sum(not storage.expired() for storage in alive)
        del logits
    sublayers = config.model.sublayers
    assert held[None] == sublayers
    assert held["auto"] == -(-sublayers // block_length("auto", sublayers, 4))
