"""`mhc bench transformers`: results first, then times."""

import json

import pytest

from manifold_hc.bench.output.results import load
from manifold_hc.interop.acceleration import forwards
from tests.cli.test_commands import mhc

pytestmark = pytest.mark.usefixtures("unchecked")

SMALL = ["bench", "transformers", "--layers", "2", "--tokens", "24", "--channels", "16"]


def test_both_are_right_and_timed(capfd, tmp_path):
    file = tmp_path / "transformers.json"
    status, out, _ = mhc(capfd, *SMALL, "--streams", "3", "--rounds", "2", "--json", file)
    assert status == 0
    assert "7 modules replaced" in out
    tables = json.loads(file.read_text())["transformers"]
    assert [table["problem"]["dtype"] for table in tables] == ["float32", "bfloat16"]
    for table in tables:
        theirs, ours = table["rows"]
        assert theirs["implementation"] == "transformers, eager"
        assert theirs["times_as_fast"] == 1
        assert ours["times_as_fast"] == theirs["median_seconds"] / ours["median_seconds"]
        assert len(ours["forward"]) == 2
        assert 0 < ours["error"] <= ours["tolerance"]
    assert load(file).transformers[0].replaced == 7


def test_wrong_results_are_not_timed(capfd, tmp_path, monkeypatch):
    """A write that forgets to mix; the comparison in `accelerate` would refuse it first."""
    from manifold_hc.interop.acceleration import probe

    monkeypatch.setattr(probe, "difference", lambda *_: "")
    monkeypatch.setattr(forwards, "write", lambda sublayer, y: sublayer.x + y.unsqueeze(-2))
    file = tmp_path / "transformers.json"
    status, out, err = mhc(capfd, *SMALL, "--dtype", "float32", "--json", file)
    assert status == 1
    assert "wrong: accelerated: " in out
    assert "ms" in out.splitlines()[1]
    assert "accelerated" in err
    (table,) = json.loads(file.read_text())["transformers"]
    assert [row["forward"] for row in table["rows"]] == [[], []]
