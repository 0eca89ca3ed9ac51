"""`mhc bench ops`: printed figures, refusals and exit statuses."""

import dataclasses
import json

import pytest
import torch

from manifold_hc.bench import boundaries, ops, peers
from manifold_hc.bench.problem import Problem
from manifold_hc.errors import ManifoldError
from tests.cli.test_commands import mhc

pytestmark = pytest.mark.usefixtures("unchecked")

SMALL = ["bench", "ops", "--tokens", "64", "--channels", "32", "--rounds", "3", "--eager"]
ONE = [*SMALL, "--dtype", "float32"]


def missing(problem, inputs):
    raise ImportError("No module named 'nowhere'")


def wrong(problem, inputs):
    right = ops.ours(problem, inputs, "reference")

    def step(x, y):
        u, new = right.step(x, y)
        return u, new.flip(-2)

    return dataclasses.replace(right, step=step)


@pytest.fixture
def with_peer(monkeypatch):
    """Replace all peers by one that `build` makes."""

    def replace(build):
        monkeypatch.setattr(peers, "PEERS", (peers.Peer("invented", None),))
        monkeypatch.setattr(
            peers.Peer, "build", lambda peer, problem, inputs: build(problem, inputs)
        )
        monkeypatch.setattr(peers.Peer, "version", "1.0")

    return replace


def test_table_and_json(capfd, tmp_path):
    file = tmp_path / "ops.json"
    status, out, _ = mhc(capfd, *SMALL, "--json", file)
    assert status == 0
    for shown in ("manifold-hc, reference", "transformers", "hyper-connections", "other maths"):
        assert shown in out
    for shown in ("18C a token", "23C", "fastest eager peer", "float32", "bfloat16", "sinkhorn"):
        assert shown in out
    assert "compiled ones included" not in out
    record = json.loads(file.read_text())
    assert record.keys() >= {"bench", "machine", "date", "commit", "command", "ops"}
    assert record["machine"]["versions"].keys() >= {"torch", "transformers", "hyper-connections"}
    assert [table["problem"]["dtype"] for table in record["ops"]] == ["float32", "bfloat16"]
    for table in record["ops"]:
        assert table["forward_bytes"] + table["backward_bytes"] == 41 * 64 * 32 * (
            4 if table["problem"]["dtype"] == "float32" else 2
        )
        for row in table["rows"]:
            assert row["state"] == "timed"
            assert len(row["forward"]) == len(row["backward"]) == 3
            assert row["median_seconds"] > 0
            assert row["extra_bytes"] is not None
        assert {row["operator"] for row in table["operators"]} == {
            "sinkhorn", "coefficients", "read", "write",
        }  # fmt: skip
        assert table["fastest_peer"] in ("transformers", "hyper-connections")


def test_a_wrong_peer_has_no_figures(capfd, tmp_path, with_peer):
    with_peer(wrong)
    file = tmp_path / "ops.json"
    status, out, err = mhc(capfd, *ONE, "--json", file)
    assert status == 1
    (line,) = [line for line in out.splitlines() if "invented" in line]
    assert line.startswith("wrong: invented: ")
    assert " is off by " in line
    assert "fastest eager peer" not in out
    assert "wanted float64's results within tolerance, got others from invented" in err
    row = json.loads(file.read_text())["ops"][0]["rows"][-1]
    assert (row["state"], row["forward"], row["backward"]) == ("wrong", [], [])
    assert "median_seconds" not in row


def test_a_wrong_peer_fails_with_allow_missing(capfd, with_peer):
    with_peer(wrong)
    assert mhc(capfd, *ONE, "--allow-missing")[0] == 1


def test_a_missing_peer(capfd, with_peer):
    with_peer(missing)
    status, out, err = mhc(capfd, *ONE)
    assert status == 1
    assert "missing: invented: No module named 'nowhere'; pip install 'manifold-hc[bench]'" in out
    assert err.splitlines()[-1].startswith("mhc: error: bench ops: wanted every peer, got none of")
    status, out, _ = mhc(capfd, *ONE, "--allow-missing")
    assert status == 0
    assert "missing: invented" in out


def test_a_peer_that_is_not_installed_is_reported_before_any_work(capfd, tmp_path, monkeypatch):
    def build(problem, inputs):
        raise AssertionError("nothing is built")

    monkeypatch.setattr(ops, "copy_bandwidth", build)
    monkeypatch.setattr(peers, "PEERS", (peers.Peer("invented", build),))
    status, out, err = mhc(capfd, *ONE, "--json", tmp_path / "ops.json")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "wanted every peer, got none of invented; pip install" in err
    assert not (tmp_path / "ops.json").exists()


def test_a_peer_that_raises_has_a_row(capfd, with_peer):
    def breaks(problem, inputs):
        raise ValueError("first line\nsecond line")

    with_peer(breaks)
    status, out, _ = mhc(capfd, *ONE)
    assert status == 1
    assert "missing: invented: ValueError: first line" in out
    assert "second line" not in out


def test_prints_of_peers_are_suppressed(capfd, with_peer):
    import sys
    import warnings

    def loud(problem, inputs):
        right = ops.ours(problem, inputs, "reference")

        def step(x, y):
            print("loud")
            print("loud", file=sys.stderr)
            warnings.warn("loud", stacklevel=1)
            return right.step(x, y)

        return dataclasses.replace(right, step=step)

    with_peer(loud)
    status, out, err = mhc(capfd, *ONE)
    assert status == 0
    assert "loud" not in out + err


@pytest.mark.parametrize(
    "arguments", [["--dtype", "int8"], ["--tokens", "0"], ["--numerics", "x"], ["--device", "tpu"]]
)
def test_wrong_command_lines(capfd, arguments):
    status, _, err = mhc(capfd, *ONE, *arguments)
    assert (status, err.count("\n")) == (2, 1)


def test_groups_have_help(capfd):
    for name in ("ops", "step", "page"):
        status, out, _ = mhc(capfd, "bench", name, "--help")
        assert status == 0
        assert f"\n  mhc bench {name}" in out


def test_an_unsupported_backend_is_named(capfd, monkeypatch):
    from manifold_hc.bench.peers import implementations
    from manifold_hc.errors import BackendError

    def refuse(problem, inputs, backend):
        if backend == "slow":
            raise BackendError("coefficients: backend slow wants a GPU; use another")
        return ops.ours(problem, inputs, backend)

    monkeypatch.setattr(implementations, "backends", lambda: ["reference", "slow"])
    monkeypatch.setattr(implementations, "ours", refuse)
    status, out, _ = mhc(capfd, *ONE)
    assert status == 0
    assert "backend slow: coefficients: backend slow wants a GPU" in out
    assert "manifold-hc, slow" not in out


def test_forms_of_the_boundary_agree(capfd, tmp_path):
    """All forms have equal results; the single-pass forms have their own."""
    file = tmp_path / "ops.json"
    status, out, _ = mhc(capfd, *ONE, "--json", file)
    assert status == 0
    assert "fused boundary, with norms" in out
    rows = json.loads(file.read_text())["ops"][0]["boundaries"]
    assert {(row["form"], row["norm"]) for row in rows} == {
        (form, norm) for form in boundaries.FORMS for norm in (False, True)
    }
    assert all(len(row["forward"]) == len(row["backward"]) == 3 for row in rows)
    problem = Problem(tokens=17, channels=24)
    for norm in (False, True):
        found = {
            form: boundaries.run_of_sublayers(problem, "auto", run, norm).tensors()
            for form, run in boundaries.FORMS.items()
        }
        for form, other in (
            (boundaries.LINKED, boundaries.SEPARATE),
            (boundaries.FUSED, boundaries.SEPARATE),
            (boundaries.SINGLE_FUSED, boundaries.SINGLE),
        ):
            for a, b in zip(found[form], found[other], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(found[boundaries.SINGLE][1], found[boundaries.SEPARATE][1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", [boundaries.LINKED, boundaries.FUSED, boundaries.SINGLE_FUSED])
def test_a_wrong_form_stops_the_bench(monkeypatch, form, dtype):
    problem = Problem(tokens=17, channels=24, dtype=dtype)
    for norm in (False, True):
        boundaries.require_correct(problem, "auto", norm)
    plain = boundaries.FORMS[form]

    def larger(*arguments):
        *inputs, last = plain(*arguments)
        return [*inputs, 1.2 * last]

    monkeypatch.setitem(boundaries.FORMS, form, larger)
    with pytest.raises(ManifoldError, match=f"{form}, auto, is wrong: .* is off by"):
        boundaries.bench_boundaries(problem, "auto", 1)
