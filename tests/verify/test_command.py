"""`mhc verify --checkpoint` and `--peers`: tables, exit statuses, and every user's mistake."""

import json
from importlib import metadata

import pytest
import torch
from safetensors.torch import load_file, save_file

from manifold_hc.interop.layouts import LAYOUTS
from manifold_hc.verify import agreement
from manifold_hc.verify.references import TILE_KERNELS, TRANSFORMERS, tile_kernels
from tests.cli.test_commands import mhc
from tests.verify.changed import recording

pytestmark = [pytest.mark.usefixtures("unchecked"), pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def files(tmp_path, stack, monkeypatch):
    """A checkpoint, the same model in another layout, and a recording, in the working directory."""
    monkeypatch.chdir(tmp_path)
    tensors = dict(stack.state_dict())
    save_file(LAYOUTS["deepseek_v4"].from_native(tensors), "model.safetensors")
    save_file(LAYOUTS["tile_kernels"].from_native(tensors), "other.safetensors")
    save_file(recording(stack), "mine.safetensors")
    save_file(recording(stack, direct=True), "flipped.safetensors")
    return tmp_path


def changed(name, change):
    tensors = load_file(name)
    change(tensors)
    save_file(tensors, "changed.safetensors")
    return "changed.safetensors"


def check(capfd, *arguments):
    return mhc(capfd, "verify", "--checkpoint", "model.safetensors", *arguments)


def test_a_checkpoint_agrees_with_its_library(capfd, files):
    before = sorted(files.iterdir())
    status, out, _ = check(capfd, "--tokens", 3, "--json", "result.json")
    assert status == 0
    assert "layout deepseek_v4" in out
    assert "compared with  transformers" in out
    assert "assumed        iterations, norm_eps, hc_eps" in out
    rows = [line.split() for line in out.splitlines() if line.split()[0] in ("post", "u", "new")]
    assert [(row[0], row[1], row[4]) for row in rows] == [
        (name, "4", "ok") for name in ("post", "u", "new")
    ]
    content = json.loads((files / "result.json").read_text())
    assert content["ok"]
    assert content["layout"] == "deepseek_v4"
    assert content["report"]["precision"] == "float64"
    assert len(content["report"]["compared"]) == 4 * 3 + 1
    assert sorted(files.iterdir()) == sorted([*before, files / "result.json"])


def test_a_recording_of_another_convention_differs(capfd, files):
    status, out, err = check(capfd, "--recorded", "flipped.safetensors", "--json", "result.json")
    assert status == 1
    sentence = "res is mixed in the other direction: res[o, i] = comb[o, i]"
    assert f"{sentence}; fits all 4 sublayers and the exit" in out
    assert "wanted new of sublayer 0 (layers.0.hc_attn_fn) within 1.0e-10" in err
    assert sentence in err
    content = json.loads((files / "result.json").read_text())
    assert not content["ok"]
    assert content["report"]["diagnosis"]["verdict"] == "convention"
    assert check(capfd, "--recorded", "mine.safetensors")[0] == 0


def test_one_entry_of_a_recorded_model_is_found(capfd, files):
    def change(tensors):
        tensors["layers.1.hc_attn_fn"][2, 3] += 1e-3

    name = changed("model.safetensors", change)
    status, out, err = mhc(capfd, "verify", "--checkpoint", name, "--recorded", "mine.safetensors")
    assert status == 1
    assert "sublayer 2 alone differs and 4 of 5 agree" in out
    assert "wanted u of sublayer 2 (layers.1.hc_attn_fn)" in err


def test_a_second_checkpoint_is_compared_entry_by_entry(capfd, files):
    assert check(capfd, "--against", "other.safetensors", "iterations=20")[0] == 0

    def change(tensors):
        tensors["sublayers.2.base"][1] += 1e-3

    name = changed("other.safetensors", change)
    status, out, err = check(capfd, "--against", name, "iterations=20")
    assert status == 1
    assert "connections.2.maps.bias: 1 of 24 entries differ, the first is [1]" in out
    assert "sublayer 2 alone differs" in err


def test_weights_that_no_token_shows_still_differ(capfd, files):
    """phi of a gate that is 0 changes no result."""

    def mute(tensors):
        tensors["layers.1.hc_attn_scale"].zero_()

    def change(tensors):
        tensors["layers.1.hc_attn_fn"][2, 3] += 1e-3

    (files / changed("model.safetensors", mute)).rename(files / "muted.safetensors")
    name = changed("muted.safetensors", change)
    status, out, err = mhc(capfd, "verify", "--checkpoint", "muted.safetensors", "--against", name)
    assert status == 1
    assert "connections.2.maps.phi: 1 of 768 entries differ" in out
    assert (
        "wanted equal weights, got 1 that differ, first connections.2.maps.phi; the results" in err
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_copy_in_bfloat16_is_equal_up_to_rounding(capfd, files, dtype):
    """Stored in bfloat16, or cast to it and back."""
    tensors = load_file("other.safetensors")
    narrow = {name: tensor.bfloat16().to(dtype) for name, tensor in tensors.items()}
    save_file(narrow, "narrow.safetensors")
    arguments = "--against", "narrow.safetensors", "iterations=20", "--json", "result.json"
    status, out, _ = check(capfd, *arguments)
    assert status == 0
    assert out.splitlines()[-1] == "equal up to the rounding of bfloat16 weights"
    assert "DIFFERS" not in out
    content = json.loads((files / "result.json").read_text())
    assert content["ok"]
    assert content["report"]["diagnosis"] is None
    assert content["rounded"]["connections.0.maps.phi"] == "bfloat16"
    narrow["sublayers.2.base"][1] += 1
    save_file(narrow, "narrow.safetensors")
    status, out, err = check(capfd, *arguments)
    assert status == 1
    assert "connections.2.maps.bias: 1 of 24 entries differ, the first is [1]" in out
    assert "sublayer 2 alone differs and 4 of 5 agree" in err
    assert "up to the rounding" not in out


@pytest.mark.parametrize("layout", ["megatron_dev", "torchtitan"])
def test_a_layout_without_a_reference_is_not_a_difference(capfd, files, stack, layout):
    save_file(LAYOUTS[layout].from_native(dict(stack.state_dict())), "model.safetensors")
    status, out, err = check(capfd)
    assert status == 2
    assert f"reference implementation of layout {layout} but none does" in err
    assert out == ""


def test_a_missing_package_is_not_a_difference(capfd, files, monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    tile_kernels._code.cache_clear()
    monkeypatch.setattr(tile_kernels.metadata, "distribution", missing)
    status, out, err = mhc(capfd, "verify", "--checkpoint", "other.safetensors")
    assert status == 2
    assert "pip install --no-deps tile-kernels" in err
    assert out == ""


@pytest.mark.parametrize("error", [ZeroDivisionError("x"), RuntimeError("can't allocate memory")])
def test_an_unexpected_error_is_not_a_difference(capfd, files, monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr("manifold_hc.verify.compare", fail)
    status, out, err = check(capfd, "--recorded", "mine.safetensors")
    assert status == 2
    assert f"wanted a comparison, got {type(error).__name__}: {error} (" in err
    assert err.count("\n") == 1
    assert out == ""


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("side", ["--checkpoint", "--against"])
def test_weights_that_are_not_finite_are_named(capfd, files, value, side):
    def change(tensors):
        for name in ("layers.1.hc_ffn_fn", "layers.0.hc_attn_base"):
            tensors[name].view(-1)[3] = value

    name = changed("model.safetensors", change)
    both = {"--checkpoint": "model.safetensors", "--against": "model.safetensors", side: name}
    status, out, err = mhc(capfd, "verify", *(word for pair in both.items() for word in pair))
    assert status == 2
    assert (
        f"{name}: weights must be finite but layers.0.hc_attn_base, layers.1.hc_ffn_fn have" in err
    )
    assert out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "nowhere"], "nowhere: does not exist"),
        (["--checkpoint", "model.safetensors", "--layout", "x"], "layout: must be one of"),
        (["--checkpoint", "mine.safetensors"], "mine.safetensors: has no connections"),
        (["--layout", "liger"], "--layout needs --checkpoint"),
        (["--tokens", "3"], "--tokens needs --checkpoint"),
        (["iterations=3"], "KEY=VALUE needs --checkpoint"),
        (["--markdown", "x.md"], "--markdown needs --peers"),
        (["--peers", "--device", "cpu"], "--device is for the check of the operators"),
        (["--checkpoint", "model.safetensors", "--peers"], "exclude each other"),
        (["--checkpoint", "model.safetensors", "iteration=3"], "did you mean iterations"),
        (["--checkpoint", "model.safetensors", "--against-layout", "x"], "needs --against"),
        (
            ["--checkpoint", "model.safetensors", "--recorded", "model.safetensors"],
            "is no name of a recording",
        ),
        (["--checkpoint", "model.safetensors", "--recorded", "no"], "no: must be a safetensors"),
        (
            ["--checkpoint", "model.safetensors", "--recorded", "a", "--against", "b"],
            "--against and --recorded exclude each other",
        ),
        (["--checkpoint", "model.safetensors", "--tokens", "0"], "--tokens"),
    ],
)
def test_a_mistake_is_one_line(capfd, files, arguments, message):
    before = sorted(files.iterdir())
    status, out, err = mhc(capfd, "verify", *arguments)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert out == ""
    assert sorted(files.iterdir()) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("layers.1.hc_ffn_fn"), "layers.1.hc_ffn_fn [24, 32] is missing"),
        (
            lambda t: t.update({"layers.1.hc_ffn_fn": t["layers.1.hc_ffn_fn"].T.contiguous()}),
            "layers.1.hc_ffn_fn is [32, 24], the transpose of [24, 32]",
        ),
        (
            lambda t: t.update({"layers.1.hc_ffn_more": torch.zeros(2)}),
            "layers.1.hc_ffn_more has no place",
        ),
    ],
)
def test_a_broken_checkpoint_is_named(capfd, files, change, message):
    status, out, err = mhc(
        capfd, "verify", "--checkpoint", changed("model.safetensors", change), "--json", "x.json"
    )
    assert status == 2
    assert message in err
    assert out == ""
    assert not (files / "x.json").exists()


def test_peers_are_compared_and_the_page_is_written(capfd, tmp_path, monkeypatch):
    def agreements():
        yield agreement.compare_library(TRANSFORMERS, streams=(2, 4))
        yield TILE_KERNELS

    monkeypatch.setattr(agreement, "agreements", agreements)
    file = tmp_path / "agreement.md"
    status, out, _ = mhc(
        capfd, "verify", "--peers", "--markdown", file, "--json", tmp_path / "peers.json"
    )
    assert status == 0
    assert "not installed: tile-kernels" in out
    assert "| transformers" in file.read_text()
    (row,) = json.loads((tmp_path / "peers.json").read_text())["peers"]
    assert (row["package"], row["constraint"], row["swap"]) == ("transformers", "sinkhorn", False)


def test_a_peer_that_disagrees_fails_without_a_page(capfd, tmp_path, monkeypatch):
    def agreements():
        found = agreement.compare_library(TRANSFORMERS, streams=(2,))
        found.gradients = 1e-3
        yield found

    monkeypatch.setattr(agreement, "agreements", agreements)
    file = tmp_path / "agreement.md"
    status, out, err = mhc(capfd, "verify", "--peers", "--markdown", file)
    assert status == 1
    assert "DIFFERS" in out
    assert "wanted transformers" in err
    assert not file.exists()
