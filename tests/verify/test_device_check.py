"""`mhc verify`: wrong outputs and gradients fail with their name, and all checks are counted."""

import json
from types import SimpleNamespace

import pytest

from manifold_hc import functional, reference
from manifold_hc.verify import operators as v
from tests.cli.test_commands import mhc

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(v, "SHAPES", ((5, 3, 7), (4, 4, 16)))
    monkeypatch.setattr(v, "DTYPES", {n: v.DTYPES[n] for n in ("float32", "bfloat16")})


def test_all_is_well(capfd, tmp_path):
    file = tmp_path / "verify.json"
    status, out, _ = mhc(capfd, "verify", "--json", file)
    assert status == 0
    assert "0 failed" in out
    content = json.loads(file.read_text())
    assert content["machine"]["kind"] == "cpu"
    checks = content["checks"]
    served = {check["name"] for check in checks if check["backend"] == "reference"}
    for name in ("read", "write", "collapse", "hc_coefficients", "connection, deepseek_v4"):
        assert name in served
    assert {c["dtype"] for c in checks} == {"float64", "float32", "bfloat16", "float16"}
    assert sum(check["name"].startswith("peer") for check in checks) == 4
    assert all(c["error"] <= c["tolerance"] for c in checks if c["state"] == "ok")
    ran = [c for c in checks if c["state"] in ("ok", "FAILED")]
    assert len(ran) < len(checks)
    assert f"{len(ran)} checks ran on cpu, 0 failed" in out
    reasons = [line for line in out.splitlines() if " skipped, " in line]
    assert sum(int(line.split()[0]) for line in reasons) == len(checks) - len(ran)
    (triton,) = [line for line in reasons if "skipped, triton: " in line]
    assert "computes on a GPU but x is on cpu" in triton


@pytest.mark.usefixtures("short")
def test_a_transposed_res_fails(capfd, monkeypatch):
    def transposed(x, y, post, res):
        return reference.write(x, y, post, res.mT)

    # The peers are compared with the reference itself, which stays as it is.
    broken = SimpleNamespace(**{**vars(reference), "write": transposed})
    monkeypatch.setattr(functional, "reference", broken)
    status, out, err = mhc(capfd, "verify", "--device", "cpu")
    assert status == 1
    failed = [line for line in out.splitlines() if "FAILED" in line]
    assert {line.split("  ")[0] for line in failed} >= {"write", "connection, paper"}
    assert not [line for line in failed if line.startswith(("read", "coefficients", "peer"))]
    assert "verify: wanted every check within its tolerance" in err


@pytest.mark.usefixtures("short")
def test_a_gradient_that_is_off_fails(capfd, monkeypatch):
    read = reference.read

    def off(x, pre):
        u = read(x, pre)
        return u.detach() + 1.01 * (u - u.detach())

    monkeypatch.setattr(reference, "read", off)
    status, out, _ = mhc(capfd, "verify")
    assert status == 1
    assert [line for line in out.splitlines() if line.startswith("read ") and "FAILED" in line]


@pytest.mark.usefixtures("short")
def test_what_breaks_fails_and_what_refuses_does_not(capfd, monkeypatch):
    def breaks(*arguments):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(v, "backends", lambda: ["reference", "unknown"])
    monkeypatch.setattr(reference, "collapse", breaks)
    status, out, _ = mhc(capfd, "verify")
    assert status == 1
    refused = [
        line for line in out.splitlines() if " unknown " in line and line.startswith("read ")
    ]
    assert refused
    assert all(line.rstrip().endswith("not served") for line in refused)
    assert "RuntimeError: out of luck" in out


@pytest.mark.usefixtures("short")
def test_a_peer_that_is_missing_is_no_failure(capfd, monkeypatch):
    def missing(problem, inputs):
        raise ImportError("No module named 'nowhere'")

    monkeypatch.setattr(v.peers, "PEERS", (v.peers.Peer("invented", missing),))
    status, out, _ = mhc(capfd, "verify")
    assert status == 0
    assert "not installed: No module named 'nowhere'" in out


def test_every_operator_of_the_table_is_checked():
    names = {case.name.partition(",")[0] for case in v.cases()}
    names.add("coefficients_and_read")  # inside "connection"
    operators = {name for name in functional.__all__ if name.islower()} - {"expand"}
    assert operators <= names
