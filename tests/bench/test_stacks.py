"""`mhc bench memory`: bytes by kind, against counts by hand."""

import json

import pytest

from manifold_hc.bench.output.page import page
from manifold_hc.bench.output.results import load, save
from tests.cli.test_commands import mhc

pytestmark = pytest.mark.usefixtures("unchecked")

SMALL = ["bench", "memory", "--sublayers", "12", "--tokens", "256", "--channels", "256"]
ONE = [*SMALL, "--rounds", "2", "--dtype", "float32"]


def rows_of(capfd, tmp_path, *more):
    file = tmp_path / "memory.json"
    status, out, _ = mhc(capfd, *ONE, *more, "--json", file)
    assert status == 0
    (table,) = json.loads(file.read_text())["memory"]
    one = 256 * 256 * 4  # a C a token
    held = {
        row["recompute"]: {kind: size / one for kind, size in row["held"].items()}
        | {"peak": row["peak"] / one, "most": row["most_streams"] / one}
        for row in table["rows"]
    }
    return held, out, load(file)


@pytest.mark.parametrize("more", [[], ["--single-pass"]], ids=["standard", "single-pass"])
def test_bytes_that_a_stack_holds(capfd, tmp_path, more):
    """Twelve sublayers of four streams; auto is three: four first streams, and two rebuilt."""
    held, out, record = rows_of(capfd, tmp_path, "--recompute", "4", *more)
    assert held.keys() == {None, 3, 4}
    assert "3, auto" in out
    assert held[None]["streams"] == 12 * 4
    assert held[3]["streams"] == (4 + 2) * 4
    assert held[4]["streams"] == (3 + 3) * 4
    for length in (3, 4):
        assert held[length]["branch outputs"] in (11, 12)
        assert held[length]["normalised"] == length
        assert held[length]["most"] <= held[length]["streams"] + 4
        assert held[length]["peak"] < 0.8 * held[None]["peak"]
    assert held[None]["normalised"] >= 11
    assert held[None]["stream gradients"] in (4, 8)
    text = page_of(record, tmp_path)
    assert "streams held at most: 24C a token in blocks of 3" in text


def page_of(record, tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    save(record, folder)
    return page(folder)


def test_norms_inside_the_branches_keep_their_results(capfd, tmp_path):
    held, _, _ = rows_of(capfd, tmp_path, "--recompute", "3", "--norms", "inside")
    assert held[3]["normalised"] >= 11
    assert held[3]["inputs"] == 3
    assert held[3]["streams"] == (4 + 2) * 4


def test_a_block_longer_than_the_stack(capfd):
    status, _, err = mhc(capfd, *ONE, "--recompute", "13")
    assert status == 2
    assert "a block must have 1 to 12 sublayers but has 13" in err
