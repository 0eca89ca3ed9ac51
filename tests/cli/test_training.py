"""Commands that train: sources, shards, resuming, presets."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest

from manifold_hc.training import Checkpoints, RunFolder
from manifold_hc.training.config import CheckpointConfig
from tests.cli.test_commands import SMALL, mhc

pytestmark = pytest.mark.usefixtures("unchecked")


def losses(folder):
    return [r["loss"] for r in RunFolder(folder).metrics() if r["event"] == "step"]


def files(folder):
    return {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_resume_needs_only_the_run_folder(capfd, tmp_path, text_file):
    run, whole = tmp_path / "run", tmp_path / "whole"
    flat = ["--data", text_file, *SMALL, "optimizer.schedule=constant"]
    assert mhc(capfd, "train", *flat, "--out", run)[0] == 0
    assert mhc(capfd, "train", *flat, "--out", whole, "training.steps=6")[0] == 0
    changed = ["training.steps=6", "data.verify=false", "connection.backend=reference"]
    status, out, err = mhc(capfd, "train", "--resume", run, *changed)
    assert status == 0
    assert f"run folder: {run}" in out
    assert f"going on from {run / 'checkpoints' / 'step-00000003'}" in err
    assert losses(run)[:3] == losses(whole)[:3]
    assert losses(run) == pytest.approx(losses(whole), rel=1e-5)  # another backend's rounding
    assert len(losses(run)) == 6


def test_invalid_changes_on_resume_are_errors(capfd, tmp_path, text_file):
    run = tmp_path / "run"
    assert mhc(capfd, "train", "--data", text_file, *SMALL, "--out", run)[0] == 0
    (tmp_path / "other.txt").write_text(text_file.read_text()[1:])
    before = files(run)
    for arguments, message in (
        ([], "holds a complete run of 3 steps; give more training.steps to go on"),
        (
            ["model.blocks=2", "training.seed=3"],
            "model.blocks, training.seed cannot change in a run",
        ),
        (["connection.kind=hc"], "connection.kind cannot change"),
        (["--out", tmp_path / "new"], "leave out --out, --preset and --config"),
        (["--preset", "tiny"], "leave out --out, --preset and --config"),
        (["--step", "2", "training.steps=9"], "has none of step 2; there are: 3"),
        (["--data", tmp_path / "other.txt", "training.steps=9"], "was made on other data"),
    ):
        status, _, err = mhc(capfd, "train", "--resume", run, *arguments)
        assert (status, err.splitlines()[-1][:12]) == (2, "mhc: error: "), arguments
        assert message in err
        assert files(run) == before
    assert mhc(capfd, "train", "--step", "2", "--data", text_file)[0] == 2
    assert mhc(capfd, "train", "--resume", tmp_path)[0] == 2


def test_resume_skips_a_damaged_checkpoint(capfd, tmp_path, text_file):
    run = tmp_path / "run"
    assert (
        mhc(capfd, "train", "--data", text_file, *SMALL, "checkpoint.every=2", "--out", run)[0] == 0
    )
    weights = run / "checkpoints" / "step-00000003" / "__0_0.distcp"
    weights.write_bytes(weights.read_bytes()[:-100])
    before = files(run)
    status, _, err = mhc(capfd, "train", "--resume", run, "--step", 3, "training.steps=5")
    assert (status, err.count("\n")) == (2, 1)
    assert "__0_0.distcp is truncated or altered" in err
    assert files(run) == before
    status, _, err = mhc(capfd, "train", "--resume", run, "training.steps=5")
    assert status == 0
    assert "CHECKPOINT DAMAGED AND PASSED OVER" in err
    assert len(losses(run)) == 5
    assert (run / "checkpoints" / "step-00000003.abandoned").exists()


def test_a_checkpoint_of_another_model(capfd, tmp_path, text_file):
    one, other = tmp_path / "one", tmp_path / "other"
    base = ["train", "--data", text_file, *SMALL]
    assert mhc(capfd, *base, "--out", one)[0] == 0
    assert mhc(capfd, *base, "--out", other, "model.channels=24")[0] == 0
    shutil.rmtree(one / "checkpoints")
    shutil.copytree(other / "checkpoints", one / "checkpoints")
    before = files(one)
    status, _, err = mhc(capfd, "train", "--resume", one, "training.steps=5")
    assert status == 2
    assert "is of another model; of another shape: embedding.weight [256, 24] instead of" in err
    assert files(one) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_process_names_the_command_to_resume(tmp_path, text_file, number):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "manifold_hc", "train", "--data", str(text_file), "--out"]
    steps = ["training.steps=100000", "training.probe_every=100000"]
    process = subprocess.Popen(
        [*command, str(run), *SMALL, *steps], stderr=subprocess.PIPE, text=True
    )
    while not (run / "metrics.jsonl").exists() or len(losses(run)) < 3:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    line = err.splitlines()[-1]
    taken = len(losses(run))
    assert line == (
        f"mhc: error: train: stopped by {number.name} after {taken} steps; "
        f"its checkpoint is saved; go on with: mhc train --resume {run}"
    )
    found = Checkpoints(run / "checkpoints", CheckpointConfig(), "").find()
    assert found.name == f"step-{taken:08}"
    (recorded,) = json.loads((run / "run.json").read_text())["commands"]
    assert recorded.startswith("mhc train --data ")


def test_a_stopped_comparison_resumes_by_the_same_command(tmp_path, text_file, capfd):
    both, whole = tmp_path / "both", tmp_path / "whole"
    options = ["compare", "--data", str(text_file), *SMALL, "--variant", "mhc", "--variant", "hc"]
    options += ["training.steps=150", "training.probe_every=50"]
    command = [sys.executable, "-m", "manifold_hc", *options, "--out", str(both)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    first = both / "mhc" / "seed-0"
    while not (first / "metrics.jsonl").exists() or len(losses(first)) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1].endswith("the same command goes on from there")
    assert mhc(capfd, *options, "--out", both)[0] == 0
    assert mhc(capfd, *options, "--out", whole)[0] == 0
    for variant in ("mhc", "hc"):
        assert losses(both / variant / "seed-0") == losses(whole / variant / "seed-0")


def test_dry_run_reads_and_writes_nothing(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = mhc(capfd, "train", "--preset", "27b", "--dry-run", "--data", "nowhere")
    assert (status, err) == (0, "")
    assert "4,138,873,940" in out
    assert not list(tmp_path.iterdir())
    small = mhc(capfd, "train", "--dry-run", "optimizer.schedule=cosine", "training.steps=10")[1]
    assert "learning rate at step 9" in small
    assert "processes" not in small


def test_dry_run_shows_the_processes(capfd):
    pipeline = ("parallel.pipeline=5", "parallel.schedule=DualPipeV", "training.accumulate=64")
    out = mhc(capfd, "train", "--preset", "27b", "--dry-run", *pipeline, "parallel.shard=4")[1]
    assert "pipeline 5 x shard 4; DualPipeV over 10 stages of 3 blocks" in " ".join(out.split())
    assert "microbatches: 64 of 5 sequences" in " ".join(out.split())


def test_a_comparison_runs_in_one_process(capfd, tmp_path, text_file):
    found = mhc(
        capfd, "compare", "--data", text_file, "--out", tmp_path / "c", "parallel.schedule=GPipe"
    )
    assert found[0] == 2
    assert "compare: trains in one process; leave the keys of parallel alone" in found[2]
    assert not (tmp_path / "c").exists()


def test_shards_give_the_losses_of_their_text(capfd, tmp_path, text_file, bpe):
    shards, tokenizer = tmp_path / "shards", bpe()
    status, out, err = mhc(
        capfd, "tokenize", text_file, "--tokenizer", tokenizer, "--out", shards,
        "--json", tmp_path / "figures.json",
    )  # fmt: skip
    said = f"{tokenizer}: documents are separated by <|endoftext|> (id 0), by its name\n"
    assert (status, err) == (0, said)
    assert f"shards: {shards}" in out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (figures["documents"], figures["shards"], figures["vocabulary"]) == (1, 1, 300)
    vocabulary = ["model.vocabulary=300"]
    mapped = ["--data", shards, *vocabulary]
    read = ["--data", text_file, f"data.tokenizer={tokenizer}", *vocabulary]
    for name, data in (("mapped", mapped), ("read", read)):
        assert mhc(capfd, "train", *data, *SMALL, "--out", tmp_path / name)[0] == 0
    assert losses(tmp_path / "mapped") == losses(tmp_path / "read")


def test_bad_shards_are_one_line(capfd, tmp_path, text_file, bpe):
    shards, tokenizer = tmp_path / "shards", bpe()
    assert mhc(capfd, "tokenize", text_file, "--tokenizer", tokenizer, "--out", shards)[0] == 0
    before = files(shards)
    base = ["train", "--data", shards, *SMALL, "--out", tmp_path / "run"]
    for arguments, message in (
        ([], "tokenizer.json has 300 ids but model.vocabulary is 256"),
        (["data.tokenizer=bytes"], f"{shards} was made with another tokenizer"),
        ([f"data.tokenizer={bpe(310)}"], f"{shards} was made with another tokenizer"),
    ):
        status, _, err = mhc(capfd, *base, *arguments)
        assert (status, err.count("\n")) == (2, 1)
        assert message in err
    for arguments, message in (
        ([shards], "is tokenized already"),
        ([text_file, "--out", shards], "is not empty"),
        ([tmp_path / "nowhere"], "does not exist"),
        ([text_file, "--tokenizer", text_file], "is no tokenizer.json"),
        ([text_file, "--shard-tokens", "0"], "not in the range"),
        ([text_file, "--out", text_file / "below"], "cannot be made (Not a directory)"),
    ):
        out = [] if "--out" in arguments else ["--out", tmp_path / "new"]
        status, _, err = mhc(capfd, "tokenize", *arguments, *out)
        assert (status, err.count("\n")) == (2, 1)
        assert message in err
        assert not (tmp_path / "new").exists()
    assert files(shards) == before
    assert not list(tmp_path.glob(".*")), "nothing half written"


def test_several_sources_with_weights(capfd, tmp_path, text_file):
    (tmp_path / "more.jsonl").write_text(json.dumps({"text": text_file.read_text()[:9000]}) + "\n")
    sources = ["--data", text_file, "--data", tmp_path / "more.jsonl", "data.weights=3,1"]
    run = tmp_path / "run"
    assert mhc(capfd, "train", *sources, *SMALL, "--out", run)[0] == 0
    config = json.loads((run / "config.json").read_text())["data"]
    assert config["paths"] == [str(text_file), str(tmp_path / "more.jsonl")]
    assert config["weights"] == [3.0, 1.0]


def test_an_interrupted_tokenize_leaves_nothing(capfd, tmp_path):
    (tmp_path / "lines.jsonl").write_text('{"text": "whole"}\n' * 50 + "{")
    command = ["tokenize", tmp_path / "lines.jsonl", "--out", tmp_path / "out"]
    status, _, err = mhc(capfd, *command, "--shard-tokens", "10")
    assert status == 2
    assert "lines.jsonl, line 51: not valid JSON" in err
    assert [path.name for path in tmp_path.iterdir()] == ["lines.jsonl"]
    figures = ["--skip-broken", "--json", tmp_path / "figures.json"]
    status, _, err = mhc(capfd, *command, "--shard-tokens", "10", *figures)
    assert status == 0
    assert "broken rows left out: 1 (1 no JSON), the first is" in err
    assert json.loads((tmp_path / "figures.json").read_text())["broken_rows"] == 1
    assert json.loads((tmp_path / "out" / "shards.json").read_text())["skipped"] == {"no JSON": 1}


def test_a_run_killed_before_its_first_checkpoint_starts_again(capfd, tmp_path, text_file):
    run = tmp_path / "run"
    assert mhc(capfd, "train", "--data", text_file, *SMALL, "--out", run)[0] == 0
    wanted = losses(run)
    shutil.rmtree(run / "checkpoints")
    (run / "summary.json").unlink()
    status, _, err = mhc(capfd, "train", "--resume", run)
    assert status == 0
    assert "going on from the first step: there is no checkpoint yet" in err
    assert losses(run) == wanted


def test_the_repair_of_a_damaged_file_works(capfd, tmp_path, text_file):
    run = tmp_path / "run"
    base = ["train", "--data", text_file, *SMALL, "optimizer.schedule=constant"]
    assert mhc(capfd, *base, "--out", run)[0] == 0
    wanted = losses(run)
    whole = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(f"{whole}garbage\n")
    (run / "summary.json").write_text("garbage")
    go_on = ["train", "--resume", run]
    status, _, err = mhc(capfd, *go_on, "training.steps=4")
    assert status == 2
    assert err.endswith(f"; delete line {whole.count(chr(10)) + 1}\n")
    (run / "metrics.jsonl").write_text(whole)
    status, _, err = mhc(capfd, "report", run)
    assert status == 2
    assert err.endswith(f"; delete it, and mhc train --resume {run} writes it again\n")
    (run / "summary.json").unlink()
    assert mhc(capfd, *go_on)[0] == 0
    assert mhc(capfd, "report", run)[0] == 0
    assert losses(run) == wanted
