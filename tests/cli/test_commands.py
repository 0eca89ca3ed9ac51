import json
import os
import subprocess
import sys

import click
import pytest

from manifold_hc import cli
from manifold_hc.cli import keys, main
from manifold_hc.cli.compare import parse_variant
from manifold_hc.config import ConnectionConfig
from manifold_hc.errors import ConfigError
from manifold_hc.training import RunConfig
from manifold_hc.training.folder import locked

pytestmark = pytest.mark.usefixtures("unchecked")

SMALL = [
    "model.channels=16",
    "model.blocks=1",
    "model.feed_forward=16",
    "data.sequence=16",
    "training.steps=3",
    "training.batch=2",
    "training.validation_batches=1",
]


def mhc(capfd, *arguments):
    """Exit status, standard output and standard error of the command line."""
    try:
        main([str(argument) for argument in arguments])
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    return status, *capfd.readouterr()


def test_train_compare_and_report(capfd, tmp_path, text_file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, both = tmp_path / "one", tmp_path / "both"
    status, out, _ = mhc(capfd, "train", "--data", text_file, "--out", run, *SMALL)
    assert status == 0
    assert f"run folder: {run}" in out
    files = {"config.json", "metrics.jsonl", "model.safetensors", "summary.json"}
    assert files <= {file.name for file in run.iterdir()}

    again = ["compare", "--data", text_file, "--out", both, "--seeds", "2", *SMALL]
    status, out, err = mhc(capfd, *again, "--json", tmp_path / "figures.json")
    assert status == 0
    assert "largest composite gain" in out
    assert f"report: {both / 'report.html'}" in out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [row["variant"] for row in figures["variants"]] == ["residual", "hc", "mhc"]
    assert {"report.html", "report.png", "report.csv", "report.json"} <= {
        file.name for file in both.iterdir()
    }
    _, second, err = mhc(capfd, *again)
    assert second == out, "complete runs are kept"
    assert err.count("complete, kept") == 6

    (both / "report.html").unlink()
    assert mhc(capfd, "report", both)[0] == 0
    assert (both / "report.html").exists()
    assert mhc(capfd, "report", run, "--out", tmp_path / "page.html")[0] == 0
    page = (tmp_path / "page.html").read_text()
    record = json.loads((run / "run.json").read_text())
    for known in (str(run), record["date"], record["machine"], record["torch"], "mhc "):
        assert known in page


def test_a_run_can_start_from_the_configuration_of_another(capfd, tmp_path, text_file):
    first, second = tmp_path / "first", tmp_path / "second"
    mhc(capfd, "train", "--data", text_file, "--out", first, *SMALL, "connection.streams=3")
    config = ["--config", first / "config.json", "training.seed=7"]
    assert mhc(capfd, "train", *config, "--out", second)[0] == 0
    one, two = (json.loads((f / "config.json").read_text()) for f in (first, second))
    assert two["training"].pop("seed") == 7
    assert one["training"].pop("seed") == 0
    assert one == two


BAD_INPUT = {
    "missing data": (["--data", "nowhere.txt"], "nowhere.txt does not exist"),
    "empty data": (["--data", "empty"], "is empty"),
    "binary data": (["--data", "binary"], "binary"),
    "a folder without texts": (["--data", "nothing"], "is a folder without .txt"),
    "a broken JSON line": (["--data", "broken.jsonl"], "broken.jsonl, line 2: not valid JSON"),
    "no such tokenizer": (["data.tokenizer=nowhere.json"], "nowhere.json cannot be read"),
    "no tokenizer": (["data.tokenizer=wrong.json"], "wrong.json is no tokenizer.json"),
    "too small a vocabulary": (["model.vocabulary=255"], "bytes has 256 ids but model.vocabulary"),
    "weights without sources": (["data.weights=1,2,3"], "data.weights: must be one for every"),
    "a weight too small": (
        ["--data", "text.txt", "--data", "text.txt", "data.weights=1,1e-9"],
        "data.weights: 1e-09 is below 1 in 10000",
    ),
    "no such preset": (["--preset", "70b"], "one of tiny, tiny-moe, small, 3b, 9b, 27b, 3b-long"),
    "pieces that do not fit": (["training.accumulate=3"], "accumulate: must divide batch=2"),
    "no such precision": (["training.precision=int8"], "one of float32, bfloat16"),
    "too many active experts": (["model.experts.routed=1"], "must be at most routed=1"),
    "text shorter than one sequence": (["--data", "short"], "at least 34"),
    "an unknown key": (["training.step=9"], "did you mean training.steps?"),
    "a key without its section": (["stream=2"], "did you mean connection.streams?"),
    "an unknown section": (["conection.kind=hc"], "did you mean connection.kind?"),
    "streams = 0": (["connection.streams=0"], "connection.streams: must be at least 1 but is 0"),
    "no number": (["training.steps=many"], "training.steps: must be int but is 'many'"),
    "no such kind": (["connection.kind=mch"], "one of residual, hc, mhc"),
    "a section as a key": (["training=3"], "its keys are training.steps"),
    "no key": (["steps"], "not an option or key=value"),
    "an unknown option": (["--stride=3"], "No such option"),
    "a broken configuration": (["--config", "broken.json"], "broken.json"),
    "a wrong key in a file": (["--config", "wrong.json"], "did you mean training.steps?"),
    "an empty --data": (["--data", ""], "--data is empty"),
    "no such backend": (["connection.backend=fast"], "connection.backend: must be one of auto"),
    "not a number": (["connection.alpha=nan"], "connection.alpha: must be finite"),
    "a seed too large": (["training.seed=18446744073709551616"], "training.seed"),
    "an empty section in a file": (["--config", "section.json"], "unknown key 'traning'"),
    "a device that is not there": (["training.device=tpu"], "training.device: must be"),
}


@pytest.mark.parametrize("command", ["train", "compare"])
@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line_and_status_2(capfd, tmp_path, text_file, monkeypatch, command, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").write_text("")
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "short").write_text("too short")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "broken.jsonl").write_text('{"text": "whole"}\n{"text": "cut')
    (tmp_path / "nothing").mkdir()
    (tmp_path / "section.json").write_text('{"traning": {}}')
    (tmp_path / "wrong.json").write_text('{"training": {"stepps": 3}}')
    arguments, message = BAD_INPUT[name]
    data = [] if "--data" in arguments else ["--data", text_file]
    out = tmp_path / "runs"
    status, printed, err = mhc(capfd, command, "--out", out, *SMALL, *data, *arguments)
    assert status == 2
    assert printed == ""
    assert err.startswith("mhc: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not out.exists(), "nothing was written"


@pytest.mark.parametrize("command", ["train", "compare"])
def test_a_run_folder_in_use(capfd, tmp_path, text_file, command):
    out = tmp_path / "run"
    with locked(out):
        (out / "config.json").write_text("{}")
        status, _, err = mhc(capfd, command, "--data", text_file, "--out", out, *SMALL)
    assert (status, err.count("\n")) == (2, 1)
    assert "is in use by another process" in err


@pytest.mark.parametrize("command", ["train", "compare"])
def test_files_of_a_complete_run_are_unchanged(capfd, tmp_path, text_file, command):
    out = tmp_path / "run"
    base = [command, "--data", text_file, "--out", out, *SMALL]
    assert mhc(capfd, *base)[0] == 0
    before = {f: f.read_bytes() for f in out.rglob("*") if f.is_file()}
    status, _, err = mhc(capfd, *base, "training.steps=4")
    assert (status, err.count("\n")) == (2, 1)
    assert "choose another with --out" in err
    assert {f: f.read_bytes() for f in out.rglob("*") if f.is_file()} == before


def test_a_diverged_run_is_status_1_in_one_line(capfd, tmp_path, text_file):
    out = tmp_path / "run"
    wild = ["training.steps=60", "optimizer.lr=1e30", "optimizer.warmup=0", "optimizer.clip=0"]
    status, _, err = mhc(capfd, "train", "--data", text_file, "--out", out, *SMALL, *wild)
    assert status == 1
    assert err.splitlines()[-1].startswith("mhc: error: train: ")


def test_divergence_at_step_0_does_not_blame_the_learning_rate(capfd, tmp_path, text_file):
    base = ["train", "--data", text_file, "--out", tmp_path / "run", *SMALL]
    status, _, err = mhc(capfd, *base, "model.init_std=1e30")
    assert status == 1
    assert "is not finite at step 0" in err
    assert "no update came before it, so that no rate is to blame" in err
    assert "optimizer.lr" not in err.splitlines()[-1]


def test_resume_after_divergence_names_an_older_checkpoint(capfd, tmp_path, text_file):
    """The state before the failed step diverges at any learning rate; an older one may not."""
    out = tmp_path / "run"
    small = [*SMALL, "checkpoint.best=false", "optimizer.schedule=constant", "optimizer.warmup=0"]
    assert mhc(capfd, "train", "--data", text_file, "--out", out, *small)[0] == 0
    wild = ["train", "--resume", out, "training.steps=9", "optimizer.lr=1e30", "optimizer.clip=0"]
    status, _, err = mhc(capfd, *wild)
    assert status == 1
    assert "the state saved as step 4 is beyond repair, whatever the rate" in err
    older = f"mhc train --resume {out} --step 3 optimizer.lr="
    assert f"lower it from before that: {older}R, or in another run" in err
    status, _, err = mhc(capfd, "train", "--resume", out, "optimizer.lr=1e-3")
    assert status == 1
    assert f"{older}R" in err
    assert mhc(capfd, *older.split()[1:-1], "optimizer.lr=1e-3")[0] == 0


def test_divergence_without_an_older_checkpoint(capfd, tmp_path, text_file):
    wild = ["training.steps=9", "optimizer.lr=1e30", "optimizer.warmup=0", "optimizer.clip=0"]
    _, _, err = mhc(capfd, "train", "--data", text_file, "--out", tmp_path / "run", *SMALL, *wild)
    assert "step 1 is beyond repair, whatever the rate; start another run with a lower one" in err
    assert "--resume" not in err


def test_a_comparison_is_status_1_where_every_run_diverged(capfd, tmp_path, text_file):
    base = ["compare", "--data", text_file, "--out", tmp_path / "all", *SMALL]
    wild = ["model.init_std=1e30", "--variant", "hc", "--variant", "mhc"]
    for _ in range(2):
        status, out, err = mhc(capfd, *base, *wild)
        assert (status, err.count("mhc: error:")) == (1, 1)
        assert "report.html" in out
        assert err.splitlines()[-1].startswith("mhc: error: compare: every run in ")
    # A comparison with one complete run is a result, even if the other one diverged.
    summary = tmp_path / "all" / "mhc" / "seed-0" / "summary.json"
    figures = ("validation_loss", "seconds_per_step", "largest_gradient_norm", "parameters")
    summary.write_text(json.dumps(dict.fromkeys(figures, 1.0) | {"steps": 3}))
    assert mhc(capfd, *base, *wild)[0] == 0


def test_report_does_not_overwrite_files_of_a_run(capfd, tmp_path, text_file):
    out = tmp_path / "run"
    assert mhc(capfd, "compare", "--data", text_file, "--out", out, *SMALL)[0] == 0
    before = {f: f.read_bytes() for f in out.rglob("*") if f.is_file()}
    for arguments in (
        ["--out", out / "comparison.html"],
        ["--out", out / "hc" / "seed-0" / "summary.html"],
        ["--out", out / "hc" / "seed-0" / "config.html"],
        ["--json", out / "comparison.json"],
        ["--out", tmp_path / "page.json"],
    ):
        status, _, err = mhc(capfd, "report", out, *arguments)
        assert (status, err.count("\n")) == (2, 1)
    new = ["compare", "--data", text_file, "--out", tmp_path / "new", *SMALL]
    assert mhc(capfd, *new, "--json", out / "comparison.json")[0] == 2
    assert not (tmp_path / "new").exists(), "refused before any training"
    assert {f: f.read_bytes() for f in out.rglob("*") if f.is_file()} == before


def test_a_folder_with_other_files_is_unchanged(capfd, tmp_path, text_file):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    for command in ("train", "compare"):
        base = [command, "--data", text_file, *SMALL, "--out"]
        assert mhc(capfd, *base, tmp_path / "mine")[0] == 2
        assert [f.name for f in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
        status, _, err = mhc(capfd, *base, text_file / "below")
        assert (status, err.count("\n")) == (2, 1)


@pytest.mark.parametrize("command", ["train", "compare"])
def test_a_model_that_is_too_large_is_an_error_before_reading(capfd, tmp_path, command):
    huge = ["model.channels=3000000", "--data", tmp_path / "nowhere", "--out", tmp_path / "run"]
    status, out, err = mhc(capfd, command, *huge)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("mhc: error: model: weights, gradients and optimizer state need ")
    assert not (tmp_path / "run").exists()


def test_a_batch_that_is_too_large_is_one_line(capfd, tmp_path, text_file):
    huge = ["training.batch=2000000000", "--out", tmp_path / "run"]
    status, _, err = mhc(capfd, "train", "--data", text_file, *huge)
    assert status == 1
    assert err.splitlines()[-1].startswith("mhc: error: not enough memory")


def test_report_of_an_empty_folder(capfd, tmp_path):
    status, _, err = mhc(capfd, "report", tmp_path)
    assert (status, err.count("\n")) == (2, 1)
    assert "no complete run" in err
    assert mhc(capfd, "report", tmp_path / "missing")[0] == 2


def test_report_of_a_run_that_is_not_complete(capfd, tmp_path, text_file):
    out = tmp_path / "run"
    assert mhc(capfd, "train", "--data", text_file, "--out", out, *SMALL)[0] == 0
    (out / "summary.json").unlink()
    status, _, err = mhc(capfd, "report", out)
    assert status == 2
    assert err == (
        f"mhc: error: report: {out} is not complete, 3 of 3 steps; "
        f"go on with: mhc train --resume {out}\n"
    )


def test_a_report_that_cannot_be_written_names_its_file(capfd, tmp_path, text_file):
    out, page = tmp_path / "run", tmp_path / "page.html"
    assert mhc(capfd, "train", "--data", text_file, "--out", out, *SMALL)[0] == 0
    (tmp_path / "page.csv").mkdir()
    status, _, err = mhc(capfd, "report", out, "--out", page)
    assert status == 1
    assert err == (
        f"mhc: error: report: {tmp_path / 'page.csv'} cannot be written: Is a directory; "
        f"choose another place: mhc report {out} --out FILE.html\n"
    )


def test_a_run_of_only_warm_up_logs_one_warning(capfd, tmp_path, text_file):
    said = "training.steps=3 is all warm-up: optimizer.warmup=3; set it lower"
    base = ["--data", text_file, *SMALL]
    train, compare = ["train", *base, "--out"], ["compare", *base, "--out"]
    assert mhc(capfd, *train, tmp_path / "one", "optimizer.warmup=3")[2].count(said) == 1
    two = ["optimizer.warmup=3", "--variant", "residual", "--variant", "hc"]
    assert mhc(capfd, *compare, tmp_path / "two", *two)[2].count(said) == 1
    assert "warm-up" not in mhc(capfd, *train, tmp_path / "warm", "optimizer.warmup=2")[2]
    assert mhc(capfd, "train", *base, "--dry-run")[2] == ""


def test_resume_is_offered_for_runs_only(capfd, tmp_path, text_file):
    books, runs = tmp_path / "books", tmp_path / "runs"
    for folder, name in ((books, "thesis.txt"), (runs, "comparison.json")):
        folder.mkdir()
        (folder / name).write_text("")
    base = ["train", "--data", text_file, *SMALL, "--out"]
    assert mhc(capfd, *base, books)[2].endswith("is not empty; choose another with --out\n")
    assert mhc(capfd, *base, runs)[2].endswith(
        "another with --out, or go on with the comparison in it by the same mhc compare command\n"
    )
    assert mhc(capfd, "train", "--resume", books)[2].endswith("in another folder with --out\n")
    (books / "config.json").write_text("")
    assert mhc(capfd, *base, books)[2].endswith(f"--out, or go on with --resume {books}\n")


def test_version_info_and_help(capfd):
    import manifold_hc

    assert mhc(capfd, "--version")[1] == f"mhc {manifold_hc.__version__}\n"
    out = mhc(capfd, "info")[1]
    for row in ("manifold-hc", "torch", "devices", "backends", "compiler", "cache", "reference"):
        assert row in out
    for name in cli.commands.commands:
        status, out, _ = mhc(capfd, name, "--help")
        assert status == 0
        assert f"\n  mhc {name}" in out, "an example, on a line of its own"
        assert "\\b" not in out
    assert "training.steps=300" in mhc(capfd, "train", "--help")[1]


def test_every_key_has_a_sentence():
    rows = list(keys.describe(RunConfig()))
    assert len(rows) > 30
    for key, _, sentence in rows:
        assert sentence.rstrip().endswith("."), key


def test_values_of_every_type():
    config = keys.override(
        RunConfig(),
        [
            "connection.disable=pre,post",
            "connection.dynamic=false",
            "connection.norm_eps=1e-6",
            "optimizer.betas=0.8,0.9",
            "connection.constraint=none",
            "data.paths=a=b.txt",
        ],
    )
    assert config.connection.disable == ("pre", "post")
    assert config.connection.dynamic is False
    assert config.connection.norm_eps == 1e-6
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.connection.constraint == "none"
    assert config.data.paths == ("a=b.txt",)
    back = keys.override(config, ["connection.disable=", "connection.norm_eps=null"])
    assert back.connection.disable == ()
    assert back.connection.norm_eps is None
    for pair, wanted in {
        "optimizer.betas=1": "must be 2 numbers, as 0.9,0.95, but is '1'",
        "optimizer.betas=0.9,x": "must be 2 numbers, as 0.9,0.95, but is '0.9,x'",
        "connection.disable=pre,foo": "must be any of pre, post, res, with commas between, but is",
        "data.weights=3,many": "must be numbers with commas between but is '3,many'",
        "connection.single_pass=maybe": "must be true or false or null but is 'maybe'",
        "connection.exit=first": "must be one of mean, sum, learned, pre or null but is 'first'",
        "connection.norm_eps=small": "must be float or null but is 'small'",
    }.items():
        with pytest.raises(ConfigError, match=f"{pair.partition('=')[0]}: {wanted}"):
            keys.override(RunConfig(), [pair])


def test_keys_are_validated_together_in_any_order():
    pairs = ["connection.hc_eps=1e-5", "connection.numerics=deepseek_v4"]
    assert keys.override(RunConfig(), pairs) == keys.override(RunConfig(), pairs[::-1])
    assert keys.override(RunConfig(), ["training.steps=1", "training.steps=2"]).training.steps == 2
    with pytest.raises(ConfigError, match="steps has no keys of its own"):
        keys.override(RunConfig(), ["training.steps=1", "training.steps.more=2"])


def test_variants():
    variant = parse_variant("hc:disable=pre,post", ConnectionConfig(streams=3))
    assert variant.name == "hc disable=pre,post"
    assert variant.connection == ConnectionConfig(kind="hc", streams=3, disable=("pre", "post"))
    with pytest.raises(ConfigError, match="must start with residual, hc or mhc"):
        parse_variant("kind=hc", ConnectionConfig())
    for silent in ("hc:constraint=identity", "residual:streams=8"):
        with pytest.raises(ConfigError, match="has no effect"):
            parse_variant(silent, ConnectionConfig())
    with pytest.raises(ConfigError, match="names its kind twice"):
        parse_variant("mhc:kind=hc", ConnectionConfig())
    for empty in ("mhc:", "mhc::streams=2"):
        with pytest.raises(ConfigError, match="nothing after a colon; give a key=value there"):
            parse_variant(empty, ConnectionConfig())
    with pytest.raises(ConfigError, match="kind: must be one of residual, hc, mhc"):
        parse_variant("gpt", ConnectionConfig())


def test_output_without_a_terminal_is_plain(tmp_path, text_file):
    """In a pipe, without colour, cursor movement or wrapped tables."""
    command = [sys.executable, "-m", "manifold_hc", "compare", "--data", str(text_file)]
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "FORCE_COLOR")}
    answer = subprocess.run(
        [*command, "--out", str(tmp_path / "run"), *SMALL],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert "\x1b" not in answer.stdout + answer.stderr
    assert "\r" not in answer.stdout + answer.stderr
    assert 'backend "auto": cpu for float32 streams on cpu' in answer.stderr.splitlines()
    lines = answer.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["variant", "residual", "hc", "mhc", "report:"]


def test_an_abort_is_one_line(capfd, monkeypatch):
    def stop(**_):
        raise click.Abort

    monkeypatch.setattr(cli.commands.commands["info"], "callback", stop)
    status, _, err = mhc(capfd, "info")
    assert (status, err) == (130, "mhc: error: stopped\n")
