"""`mhc train --init`: start from given weights."""

import json
import shutil

import pytest

from manifold_hc.training import RunFolder
from tests.cli.test_commands import SMALL, mhc

pytestmark = pytest.mark.usefixtures("unchecked")


def losses(folder):
    return [r["loss"] for r in RunFolder(folder).metrics() if r["event"] == "step"]


@pytest.fixture
def base(capfd, tmp_path, text_file):
    """A residual run with checkpoints after steps 2 and 3."""
    run = tmp_path / "base"
    options = [*SMALL, "connection.kind=residual", "checkpoint.every=2"]
    options += ["optimizer.lr=0.02", "optimizer.warmup=0"]
    assert mhc(capfd, "train", "--data", text_file, *options, "--out", run)[0] == 0
    return run


def test_sizes_come_from_the_weights_and_connections_may_differ(capfd, base, text_file, tmp_path):
    again = ["--data", text_file, "training.batch=2", "training.steps=1"]
    for kind, options in {
        "residual": [],
        "hc": ["connection.kind=hc"],
        "mhc": ["connection.kind=mhc"],
    }.items():
        out = tmp_path / kind
        status, _, err = mhc(capfd, "train", "--init", base, *again, *options, "--out", out)
        assert status == 0, err
        assert f"starting from the weights of {base / 'checkpoints' / 'step-00000003'}" in err
        found, source = RunFolder(out).config(), RunFolder(base).config()
        assert (found.model, found.connection.kind) == (source.model, kind)
        assert losses(out) == pytest.approx(losses(tmp_path / "residual"), rel=1e-5)
    second = tmp_path / "second"
    assert mhc(capfd, "train", "--init", base, "--step", 2, *again, "--out", second)[0] == 0
    assert json.loads((second / "run.json").read_text())["init"]["step"] == 2
    assert losses(second) != losses(tmp_path / "residual")
    status, out, _ = mhc(capfd, "train", "--init", base, "--dry-run", "connection.kind=mhc")
    assert (status, "active parameters" in out) == (0, True)


def test_refusals_come_before_the_run_folder(capfd, base, text_file, tmp_path):
    mhc_run = tmp_path / "mhc"
    assert mhc(capfd, "train", "--data", text_file, *SMALL, "--out", mhc_run)[0] == 0
    other = tmp_path / "other.json"
    other.write_text('{"model": {"channels": 24}}')
    for init, arguments, message in (
        (base, ["model.channels=24"], "model.channels: is 24 but the weights of"),
        (base, ["--config", other], "model.channels: is 24 but the weights of"),
        (base, ["--preset", "tiny"], "--init: brings the sizes of the model; leave --preset out"),
        (base, ["--resume", base], "--init: starts a new run; --resume needs no initial weights"),
        (base, ["--step", 1], "has no checkpoint of step 1; there are: 2, 3"),
        (mhc_run, ["connection.kind=residual"], "connection.kind: is residual but the weights of"),
        (mhc_run, ["connection.streams=3"], "--drop-connections in mhc"),
        (tmp_path / "absent", [], "absent does not exist; give a run folder"),
    ):
        new = [] if "--resume" in arguments else ["--out", tmp_path / "new"]
        status, _, err = mhc(capfd, "train", "--init", init, "--data", text_file, *arguments, *new)
        assert (status, err.splitlines()[-1][:12]) == (2, "mhc: error: "), arguments
        assert message in err
        assert not (tmp_path / "new").exists()
    status, _, err = mhc(capfd, "train", "--drop-connections", "--data", text_file)
    assert (status, "belongs to --init" in err) == (2, True)


def test_a_copied_checkpoint_needs_no_name(capfd, base, text_file, tmp_path):
    lone = shutil.copytree(base / "checkpoints" / "step-00000002", tmp_path / "lone")
    options = ["--data", text_file, "training.steps=1", "training.batch=2"]
    status, _, err = mhc(capfd, "train", "--init", lone, *options, "--out", tmp_path / "new")
    assert status == 0, err
    assert json.loads((tmp_path / "new" / "run.json").read_text())["init"]["step"] == 2


def test_connections_are_dropped_on_request(capfd, text_file, tmp_path):
    source, plain = tmp_path / "source", tmp_path / "plain"
    assert mhc(capfd, "train", "--data", text_file, *SMALL, "--out", source)[0] == 0
    options = ["--data", text_file, "connection.kind=residual", "training.steps=1"]
    dropped = ["train", "--init", source, "--drop-connections", *options, "training.batch=2"]
    assert mhc(capfd, *dropped, "--out", plain)[0] == 0
    assert json.loads((plain / "run.json").read_text())["init"]["connections"] == "new"


def test_a_comparison_starts_all_variants_from_one_run(capfd, base, text_file, tmp_path):
    both = tmp_path / "both"
    options = ["--data", text_file, "--out", both, "--variant", "residual", "--variant", "mhc"]
    options += ["training.steps=2", "training.batch=2", "training.validation_batches=1"]
    from_base = ["compare", "--init", base, *options]
    status, _, err = mhc(capfd, *from_base)
    assert status == 0, err
    first = [losses(both / kind / "seed-0")[0] for kind in ("residual", "mhc")]
    assert first[1] == pytest.approx(first[0], rel=1e-5)
    assert first[0] < 5.4  # random weights have log 256 = 5.55
    record = json.loads((both / "comparison.json").read_text())["init"]
    assert (record["step"], record["connections"]) == (3, "new")

    before = {file: file.read_bytes() for file in both.rglob("*") if file.is_file()}
    for arguments, message in (
        (["compare", *options, *SMALL[:4]], "holds runs from other initial weights"),
        ([*from_base, "--step", 2], "holds runs from other initial weights"),
        ([*from_base, "--preset", "tiny"], "leave --preset out"),
        ([*from_base, "model.channels=24"], "model.channels: is 24 but the weights of"),
        (["compare", "--step", 2, *options], "--step: belongs to --init"),
    ):
        status, _, err = mhc(capfd, *arguments)
        assert (status, message in err) == (2, True), err
        assert {f: f.read_bytes() for f in both.rglob("*") if f.is_file()} == before
    run = both / "mhc" / "seed-0"
    (run / "summary.json").unlink()
    assert mhc(capfd, *from_base)[0] == 0, "an unfinished run resumes"
    assert len(losses(run)) == 2


def test_a_comparison_drops_connections_on_request(capfd, text_file, tmp_path):
    source, both = tmp_path / "source", tmp_path / "both"
    assert mhc(capfd, "train", "--data", text_file, *SMALL, "--out", source)[0] == 0
    options = ["--init", source, "--data", text_file, "training.steps=1", "training.batch=2"]
    options += ["training.validation_batches=1", "--variant", "mhc"]
    residual = ["--variant", "residual", "--out", both]
    status, _, err = mhc(capfd, "compare", *options, *residual)
    assert (status, "--drop-connections in mhc" in err, both.exists()) == (2, True, False)
    status, _, err = mhc(capfd, "compare", *options, *residual, "--drop-connections")
    assert status == 0, err
    assert json.loads((both / "comparison.json").read_text())["init"]["connections"] == "new"
    status, _, err = mhc(capfd, "compare", *options, "--out", both)
    assert (status, "holds runs from other initial weights" in err) == (2, True)
    status, _, err = mhc(capfd, "compare", "--data", text_file, "--drop-connections")
    assert (status, "--drop-connections: belongs to --init" in err) == (2, True)
