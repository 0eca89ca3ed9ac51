"""Result files, and the page and the chart made from them."""

import re
from pathlib import Path

import pytest

from manifold_hc.bench.output import results
from manifold_hc.bench.output.chart import chart
from manifold_hc.bench.output.page import page
from manifold_hc.cli.bench import _command
from manifold_hc.errors import DataError
from tests.cli.test_commands import mhc

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
OPS = "amd-epyc-avx512-2026-11-23-ops.json"


def test_a_result_file_round_trips(tmp_path, ops_result, step_result):
    for bench, result in (("ops", ops_result), ("step", step_result)):
        saved = results.record(bench, "cpu", "mhc bench", [result])
        file = results.save(saved, tmp_path)
        assert file.name.endswith(f"-{saved.date}-{saved.bench}.json")
        assert results.load(file) == saved
    assert len(list(tmp_path.iterdir())) == 2


def test_json_has_medians_and_ratios(ops_result):
    import json

    content = json.loads(
        results.as_json(results.record("ops", "cpu", "mhc bench ops", [ops_result]))
    )
    rows = {row["implementation"]: row for row in content["ops"][0]["rows"]}
    assert rows["eager"]["median_seconds"] == 10
    assert rows["eager"]["times_ours"] == 5
    assert "median_seconds" not in rows["wrong but fast"]
    assert content["ops"][0]["fastest_peer"] == "eager, compiled"


def test_the_command_names_no_file_of_this_machine(monkeypatch):
    for written in (["--json", "/home/me/ops.json"], ["--json=/home/me/ops.json"]):
        monkeypatch.setattr("sys.argv", ["/bin/mhc", "bench", "ops", *written, "--rounds", "3"])
        assert _command() == "mhc bench ops --rounds 3"


def test_the_page_names_devices_without_results(tmp_path, ops_result):
    empty = page(tmp_path)
    assert empty.count("Not measured.") == 2
    results.save(results.record("ops", "cpu", "mhc bench ops", [ops_result]), tmp_path)
    text = page(tmp_path)
    assert text.index("Not measured.") > text.index("## GPU")
    assert "| cpu | 1000 | 1000 | 2000 |" in text
    assert "fastest peer, compiled ones included: eager, compiled, 2.50 times cpu" in text
    assert "- wrong: wrong but fast: " in text
    assert "| wrong but fast |" not in text


def test_the_newest_result_of_a_device_is_shown(tmp_path, ops_result):
    for date, command in (("2026-01-02", "old"), ("2026-03-01", "new")):
        saved = results.record("ops", "cpu", f"mhc bench ops {command}", [ops_result])
        saved.date = date
        results.save(saved, tmp_path)
    assert "ops new" in page(tmp_path)
    assert "ops old" not in page(tmp_path)


def test_the_committed_page_matches_the_result_files():
    committed = ROOT / "docs" / "benchmarks.md"
    assert committed.read_text() == page(RESULTS)


def test_the_committed_chart_matches_the_result_files():
    drawn = chart(RESULTS)
    committed = (ROOT / "docs" / "images" / "benchmarks.svg").read_bytes()
    assert labels(drawn) == labels(committed)


def test_the_chart_has_a_bar_for_every_timed_implementation(tmp_path, ops_result):
    assert chart(tmp_path) is None
    results.save(results.record("ops", "cpu", "mhc bench ops", [ops_result]), tmp_path)
    drawn = labels(chart(tmp_path))
    timed = [row for row in ops_result.rows if row.state == "timed"]
    for row in timed:
        assert row.implementation in drawn
        assert f"{1e3 * row.total:.3g}" in drawn
    assert "wrong but fast" not in drawn
    assert chart(tmp_path) == chart(tmp_path)


def labels(svg):
    """The texts in an SVG, which do not depend on the version of matplotlib."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg.decode())


@pytest.mark.usefixtures("unchecked")
def test_page_command(capfd, tmp_path):
    out = tmp_path / "page.md"
    status, printed, _ = mhc(capfd, "bench", "page", "--results", tmp_path, "--out", out)
    assert (status, printed) == (0, f"page: {out}\n")
    assert out.read_text() == page(tmp_path)
    (tmp_path / "ops.json").write_bytes((RESULTS / OPS).read_bytes())
    _, printed, _ = mhc(capfd, "bench", "page", "--results", tmp_path, "--out", out)
    assert printed == f"page: {out}\nchart: {tmp_path / 'images/benchmarks.svg'}\n"
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(DataError, match=r"broken\.json is no result file"):
        page(tmp_path)
    assert mhc(capfd, "bench", "page", "--results", tmp_path, "--out", out)[0] == 2
