import io
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from manifold_hc.data import Corpus
from manifold_hc.errors import RunFolderError
from manifold_hc.report import as_csv, as_json, as_table, figures, load_runs, summarise, write_page
from manifold_hc.study.compare import Variant, compare
from manifold_hc.study.records import comparison_record, run_folder
from manifold_hc.training import OptimizerConfig, RunFolder
from manifold_hc.training.record import record_run, run_record
from tests import golden
from tests.conftest import generated_text

IDS = np.frombuffer(generated_text(40_000).encode(), dtype=np.uint8)
TEXT = Corpus.of(IDS)
CONFIG = golden.config("mhc")
VARIANTS = [Variant(kind, golden.config(kind).connection) for kind in golden.KINDS]


def run(folder: Path, config=CONFIG, variants=VARIANTS, seeds=1, corpus=TEXT):
    quiet = Console(quiet=True)
    compare(config, variants, seeds, corpus, folder, "mhc compare 'a b'", quiet)
    return load_runs(folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    run(folder, seeds=2)
    return folder


def test_variants_and_seeds_share_data_order_and_budget(finished):
    runs = load_runs(finished)
    assert [(r.variant, r.seed) for r in runs] == [
        (kind, seed) for kind in golden.KINDS for seed in (0, 1)
    ]
    runs = [r for seed in (0, 1) for r in runs if r.seed == seed]
    first = [r.series("step", "loss")[1][0] for r in runs]
    assert first[0] == pytest.approx(first[1], rel=1e-6) == pytest.approx(first[2], rel=1e-6)
    assert first[3] != pytest.approx(first[0], rel=1e-6)
    assert {len(r.series("step", "loss")[0]) for r in runs} == {20}
    losses = [r.series("step", "loss")[1].tolist() for r in runs]
    recorded = json.loads(golden.FILE.read_text())
    for kind, loss in zip(golden.KINDS, losses, strict=False):
        assert loss == pytest.approx(recorded[kind], rel=1e-3)


def test_complete_runs_are_kept_and_missing_ones_trained(tmp_path):
    run(tmp_path)
    before = {f: f.stat().st_mtime_ns for f in tmp_path.glob("*/seed-0/*.json*")}
    run_folder(tmp_path, "hc", 0).summary_file.unlink()
    losses = run_folder(tmp_path, "hc", 0).metrics()
    run(tmp_path)
    for file, time in before.items():
        assert (file.stat().st_mtime_ns == time) == ("hc" not in file.parts)
    again = run_folder(tmp_path, "hc", 0).metrics()
    assert [r["loss"] for r in again if "loss" in r] == [r["loss"] for r in losses if "loss" in r]


def test_other_settings_or_data_change_no_files(tmp_path):
    run(tmp_path, variants=VARIANTS[:1])
    before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    other = replace(CONFIG, optimizer=OptimizerConfig(lr=1.0))
    with pytest.raises(RunFolderError, match=r"another configuration \(optimizer\.lr, .*warmup\)"):
        run(tmp_path, config=other)
    with pytest.raises(RunFolderError, match="other data"):
        run(tmp_path, corpus=Corpus.of(IDS[1:]))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="something else"):
        run(foreign)
    assert {f: f.read_bytes() for f in before} == before
    assert [f.name for f in foreign.iterdir()] == ["thesis.txt"]


def test_a_comparison_continues_after_a_diverged_run(tmp_path):
    wild = replace(CONFIG, optimizer=OptimizerConfig(lr=1e30, warmup=0, clip=0.0))
    runs = run(tmp_path, config=wild, variants=VARIANTS[:2])
    assert all(r.diverged_at is not None for r in runs)
    rows = summarise(runs)
    assert [row.diverged for row in rows] == [1, 1]
    assert json.loads(json.dumps(as_json(rows, runs)))["variants"][0]["validation_loss"] is None
    write_page(runs, comparison_record(tmp_path), tmp_path / "report.html")
    assert "1 of 1 diverged" in (tmp_path / "report.html").read_text()


def test_rows_summarise_the_runs(finished):
    runs = load_runs(finished)
    row = next(row for row in summarise(runs) if row.variant == "hc")
    own = [r for r in runs if r.variant == "hc"]
    losses = [r.summary["validation_loss"] for r in own]
    assert row.validation_loss == pytest.approx(sum(losses) / 2)
    assert row.interval == pytest.approx(12.7062047 * abs(losses[0] - losses[1]) / 2, rel=1e-6)
    base = [r.summary["validation_loss"] for r in runs if r.variant == "residual"]
    paired = [a - b for a, b in zip(losses, base, strict=True)]
    assert row.difference == pytest.approx(sum(paired) / 2)
    assert row.difference_interval == pytest.approx(12.7062047 * abs(paired[0] - paired[1]) / 2)
    gains = [r["gain_backward"] for run in own for r in run.metrics if r["event"] == "gain"]
    assert row.largest_backward_gain == max(gains)
    norms = [r["gradient_norm"] for run in own for r in run.metrics if r["event"] == "step"]
    assert row.largest_gradient_norm == max(norms)


def test_table_csv_and_json_have_the_same_figures(finished):
    runs = load_runs(finished)
    rows = summarise(runs)
    lines = as_csv(rows).splitlines()
    assert [line.split(",")[0] for line in lines] == ["variant", *golden.KINDS]
    written = as_json(rows, runs)
    assert len(written["runs"]) == 6
    assert float(lines[3].split(",")[3]) == written["variants"][2]["validation_loss"]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(as_table(rows))
    text = console.export_text()
    assert f"{rows[2].validation_loss:.4f} ± " in text


def test_the_page_is_self_contained_and_deterministic(finished, tmp_path):
    runs, record = load_runs(finished), comparison_record(finished)
    for name in ("a.html", "b.html"):
        write_page(runs, record, tmp_path / name)
    page = (tmp_path / "a.html").read_text()
    assert page == (tmp_path / "b.html").read_text()
    assert page.count("mhc compare &#39;a b&#39;") == 1
    for absent in ("<script", "<link", "src=", "@import", "url(http"):
        assert absent not in page
    for present in (
        "difference to residual",
        "Validation loss",
        "composite gain, forward",
        "output stream",
        "effective rank",
        "mean of gains",
        "gain of mean",
        "&#34;kind&#34;: &#34;hc&#34;",
    ):
        assert present in page, present
    assert page.count("<svg") == 7
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def lines(axis):
    return {line.get_label(): line.get_ydata() for line in axis.lines}


def test_the_plots_show_the_runs(finished):
    runs = [run for run in load_runs(finished) if run.seed == 0]
    by_name = {run.variant: run for run in runs}
    left, right = figures.gradient_norm(runs, "residual").axes
    norms = {name: run.series("step", "gradient_norm")[1] for name, run in by_name.items()}
    assert lines(left)["hc"] == pytest.approx(norms["hc"])  # 3 % of 20 steps is one step
    assert lines(right)["hc"] == pytest.approx(norms["hc"] - norms["residual"])
    assert lines(right)["residual"] == pytest.approx(0)

    forward, backward = figures.gain_over_training(runs).axes
    assert forward.get_yscale() == backward.get_yscale() == "log"
    assert lines(backward)["mhc"] == pytest.approx(
        by_name["mhc"].series("gain", "gain_backward")[1]
    )
    depth = figures.gain_over_depth(runs).axes
    last = by_name["hc"].gains[-1]["gains"]
    for axis, row in zip(depth, last, strict=True):
        assert lines(axis)["hc"] == pytest.approx(last[row])
        assert axis.get_yscale() == "log"
    heat = figures.composite_matrices(runs).axes[1].images[0].get_array()
    assert heat.data == pytest.approx(np.array(by_name["hc"].gains[-1]["composite"][0]))


def test_rounding_noise_does_not_fill_an_axis(finished):
    runs = [run for run in load_runs(finished) if run.variant == "mhc"]
    for figure in (figures.gain_over_training(runs), figures.gain_over_depth(runs)):
        for axis in figure.axes:
            low, high = axis.get_ylim()
            assert low <= 0.5 < 2 <= high
            figures.to_png(figure)
            shown = [tick.label1.get_text() for tick in axis.yaxis.get_major_ticks()]
            assert {"0.5", "1", "2"} <= set(shown)
            assert not [t for t in axis.yaxis.get_minor_ticks() if t.label1.get_text()]
    cosine, rank = figures.streams_over_depth(runs).axes
    assert cosine.get_ylim()[0] <= 0 < 1 <= cosine.get_ylim()[1]
    assert rank.get_ylim()[0] <= 1 < 4 <= rank.get_ylim()[1]
    (heat,) = figures.composite_matrices(runs).axes[0].images
    assert heat.norm.vmin <= -1 < 1 <= heat.norm.vmax
    difference = figures._with_difference(runs, "mhc", lambda run: (np.arange(2), np.ones(2)), "")
    low, high = difference.axes[1].get_ylim()
    assert low <= -0.01 < 0.01 <= high


def test_large_gains_have_plain_numbers(finished):
    axis = figures._panels(1)[1][0]
    axis.plot([0, 1, 2], [0.9, 30.0, 3000.0])
    figures._as_gains(axis)
    figures.to_png(axis.figure)
    shown = {tick.label1.get_text() for tick in axis.yaxis.get_major_ticks()}
    assert {"1", "10", "100", "1000"} <= shown


def test_the_validation_curve(finished):
    runs = [run for run in load_runs(finished) if run.seed == 0]
    left, right = figures.validation(runs, "residual").axes
    for run in runs:
        wanted = [r["loss"] for r in run.metrics if r["event"] == "validation"]
        assert lines(left)[run.variant].tolist() == wanted
    assert lines(right)["residual"] == pytest.approx(0)


def test_a_single_run_has_a_page_too(finished, tmp_path):
    runs = load_runs(finished / "mhc" / "seed-0")
    assert [r.variant for r in runs] == ["mhc"]
    write_page(runs, {}, tmp_path / "page.html")
    assert "difference to" not in (tmp_path / "page.html").read_text()


def test_temporary_files_of_a_crash_are_ignored(tmp_path):
    (tmp_path / ".comparison.json.x1y2").write_text("{")
    assert len(run(tmp_path, variants=VARIANTS[:1])) == 1


def test_the_same_text_at_another_path_is_the_same_run(tmp_path):
    run(tmp_path, variants=VARIANTS[:1])
    moved = replace(CONFIG, data=replace(CONFIG.data, paths=("elsewhere.txt",)))
    assert len(run(tmp_path, config=moved, variants=VARIANTS[:1])) == 1


def test_variants_can_be_added_to_a_comparison(tmp_path):
    quiet = Console(quiet=True)
    for number, variant in enumerate(VARIANTS[:2]):
        compare(CONFIG, [variant], 1, TEXT, tmp_path, f"command {number}", quiet)
    (tmp_path / "residual" / "seed-0" / "summary.json").touch()
    (tmp_path / "hc" / "other").mkdir()
    shutil.copytree(tmp_path / "hc" / "seed-0", tmp_path / "hc" / "seed-0 (copy)")
    assert [r.variant for r in load_runs(tmp_path)] == ["residual", "hc"]
    assert comparison_record(tmp_path)["commands"] == ["command 0", "command 1"]


RECORD = {"commands": ["mhc"], "variants": ["mhc"], "data_sha256": "0", "date": "", "machine": ""}
NO_RECORDS = ["", "{", "[]", "{}", *(json.dumps({**RECORD, key: [1]}) for key in RECORD)]


@pytest.mark.parametrize("content", NO_RECORDS[:7])
def test_a_damaged_record_is_an_error(tmp_path, content):
    (tmp_path / "comparison.json").write_text(content)
    with pytest.raises(RunFolderError, match=r"comparison\.json is damaged: .*; put a copy of it"):
        load_runs(tmp_path)


def test_a_comparison_without_a_complete_run_goes_on(tmp_path):
    (tmp_path / "comparison.json").write_text(json.dumps(RECORD))
    with pytest.raises(RunFolderError, match="no complete run yet; the mhc compare that began it"):
        load_runs(tmp_path)


@pytest.mark.parametrize("content", [*NO_RECORDS[:5], *NO_RECORDS[7:]])
def test_a_damaged_record_of_a_run_is_replaced(tmp_path, content, caplog):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(RunFolderError, match=r"run\.json is damaged: .*; no run needs it"):
        run_record(tmp_path)
    record_run(tmp_path, "mhc train")
    assert "run.json is damaged" in caplog.text
    assert run_record(tmp_path)["commands"] == ["mhc train"]
    record_run(tmp_path, "mhc train --resume")
    assert run_record(tmp_path)["commands"] == ["mhc train", "mhc train --resume"]


def test_a_record_that_cannot_be_written_stops_no_run(tmp_path, caplog):
    (tmp_path / "run.json").mkdir()
    record_run(tmp_path, "mhc train")
    assert "run.json cannot be written: Is a directory" in caplog.text


def cut(record):
    record["stream_rank"].pop()


def without_a_row(record):
    record["gains"].pop("backward")


def ragged(record):
    record["composite"][0][0].pop()


def empty(record):
    record["composite"] = []


def of_another_kind(record):
    record["stream_cosine"][0] = "one"


@pytest.mark.parametrize("damage", [cut, without_a_row, ragged, empty, of_another_kind])
def test_a_damaged_gain_record_is_an_error(finished, tmp_path, damage):
    shutil.copytree(finished / "mhc" / "seed-0", tmp_path / "run")
    file = tmp_path / "run" / "metrics.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    damage(next(record for record in records if record["event"] == "gain"))
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    said = r"metrics\.jsonl is damaged: a gain record is .*; delete line \d+$"
    with pytest.raises(RunFolderError, match=said):
        load_runs(tmp_path / "run")


def test_a_folder_of_comparisons_is_an_error(finished):
    with pytest.raises(RunFolderError, match="no complete run"):
        load_runs(finished.parent)


def test_a_validation_loss_that_is_not_finite_gives_nan(finished, tmp_path):
    """The last step may break a model: only the validation after it shows that."""
    shutil.copytree(finished, tmp_path / "runs")
    folder = RunFolder(tmp_path / "runs" / "mhc" / "seed-0")
    folder.finish(folder.summary() | {"validation_loss": math.inf})
    *others, row = summarise(load_runs(tmp_path / "runs"))
    figures = (row.validation_loss, row.interval, row.difference, row.difference_interval)
    assert row.variant == "mhc"
    assert all(map(math.isnan, figures))
    assert all(math.isfinite(other.validation_loss) for other in others)


def test_an_upright_table_fits_a_narrow_terminal(finished):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(as_table(summarise(load_runs(finished)), upright=True))
    lines = console.export_text().splitlines()
    assert lines[0].split() == ["variant", *golden.KINDS]
    assert lines[1].startswith("validation loss")
    assert "…" not in "".join(lines)


def test_a_folder_without_runs_is_an_error(tmp_path):
    with pytest.raises(RunFolderError, match="no complete run"):
        load_runs(tmp_path)
