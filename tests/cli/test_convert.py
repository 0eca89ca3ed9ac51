"""`mhc convert`: files in, files out, what it prints, and what it refuses."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from manifold_hc.interop.layouts import LAYOUTS, open_checkpoint
from tests.cli.test_commands import SMALL, mhc
from tests.interop.layout_models import random_stack

pytestmark = pytest.mark.usefixtures("unchecked")

V4 = LAYOUTS["deepseek_v4"]


@pytest.fixture
def deepseek(tmp_path):
    """A folder with a small DeepSeek-V4: connections, one other tensor, and config.json."""
    folder = tmp_path / "deepseek"
    folder.mkdir()
    tensors = V4.from_native(random_stack(V4, n=3, channels=4, sublayers=2).state_dict())
    save_file(tensors | {"norm.weight": torch.ones(4)}, folder / "model.safetensors")
    settings = {"hc_mult": 3, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "rms_norm_eps": 1e-6}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_there_and_back_keeps_every_bit(capfd, tmp_path, deepseek):
    first, second = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    status, out, err = mhc(
        capfd, "convert", deepseek, first, "--to", "manifold", "--connections-only"
    )
    assert (status, err) == (0, "")
    for part in (
        "deepseek_v4 -> manifold",
        "3 streams, 4 channels, 2 sublayers",
        "9 used, 9 written",
        "left out          1: norm.weight",
        f"written: {first}",
    ):
        assert part in out, part
    assert mhc(capfd, "convert", first, second, "--to", "deepseek_v4")[0] == 0
    before, after = load_file(deepseek / "model.safetensors"), load_file(second)
    assert before.keys() - after.keys() == {"norm.weight"}
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


def test_other_tensors_of_the_family_are_copied(capfd, tmp_path, deepseek):
    target = tmp_path / "out" / "x.safetensors"
    status, out, _ = mhc(capfd, "convert", deepseek, target, "--to", "transformers")
    assert status == 0
    assert "kept as they are  1: norm.weight" in out
    assert torch.equal(load_file(target)["norm.weight"], torch.ones(4))


def test_hyperparameters_and_dtype(capfd, tmp_path, deepseek):
    target = tmp_path / "x.safetensors"
    arguments = ["--to", "tile_kernels", "--connections-only", "--dtype", "float64", "iterations=5"]
    message = "iterations is 20 in the files, not 5; leave out the values that the files give"
    assert message in refused(capfd, deepseek, target, *arguments)
    (deepseek / "config.json").unlink()
    status, out, _ = mhc(capfd, "convert", deepseek, target, *arguments)
    assert status == 0
    assert "iterations is 5, not tile_kernels's 10: tile_kernels needs it to be set" in out
    assert "connections are float64" in out
    assert {tensor.dtype for tensor in load_file(target).values()} == {torch.float64}
    assert open_checkpoint(target).config.iterations == 5


def test_a_file_without_its_exit_is_converted_again(capfd, tmp_path, deepseek):
    first, second = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    arguments = ["--to", "megatron", "--connections-only", "--inexact"]
    status, out, _ = mhc(capfd, "convert", deepseek, first, *arguments)
    assert status == 0
    iterations = "sinkhorn, 20 iterations"
    for part in (
        f"deepseek_v4, {iterations}, norm_eps 1e-06, hc_eps 1e-06, exit learned",
        f"paper, {iterations}, norm_eps 1e-06, hc_eps 0, exit mean",
        "hc_eps is 1e-06, not megatron's 0: megatron has no setting for it",
        "its exit is mean, not learned",
    ):
        assert part in " ".join(out.split()), part
    status, out, _ = mhc(capfd, "convert", first, second, "--to", "manifold")
    assert status == 0
    assert load_file(second).keys() == {
        f"connections.{sublayer}.maps.{one}"
        for sublayer in (0, 1)
        for one in ("phi", "alpha", "bias")
    }


def test_nan_is_refused_or_noted(capfd, tmp_path, deepseek):
    tensors = load_file(deepseek / "model.safetensors")
    tensors["layers.0.hc_ffn_fn"][2, 3] = float("nan")
    save_file(tensors, deepseek / "model.safetensors")
    arguments = [deepseek, tmp_path / "x.safetensors", "--to", "transformers"]
    assert "NaN in layers.0.hc_ffn_fn; --inexact copies" in refused(capfd, *arguments)
    status, out, _ = mhc(capfd, "convert", *arguments, "--inexact")
    assert (status, "note              NaN in layers.0.hc_ffn_fn" in out) == (0, True)


def without(tensors, name):
    return {key: tensor for key, tensor in tensors.items() if key != name}


DAMAGED = {
    "missing": (
        lambda t: without(t, "layers.0.hc_ffn_base"),
        "layers.0.hc_ffn_base [15] is missing",
    ),
    "extra": (
        lambda t: t | {"layers.7.hc_ffn_bias": torch.ones(15)},
        "layers.7.hc_ffn_bias has no place",
    ),
    "transposed": (
        lambda t: t | {"layers.0.hc_attn_fn": t["layers.0.hc_attn_fn"].mT.contiguous()},
        "layers.0.hc_attn_fn is [12, 15], the transpose of [15, 12]",
    ),
    "renamed": (
        lambda t: without(t, "hc_head_fn") | {"hc_head_phi": t["hc_head_fn"]},
        "hc_head_fn [3, 12] is missing (did you mean hc_head_phi?)",
    ),
}
"""Changes of a checkpoint of 3 streams and 4 channels, and the problems they make."""


@pytest.mark.parametrize("name", [*DAMAGED, "all"])
def test_damaged_checkpoints_are_named_and_nothing_is_written(capfd, tmp_path, deepseek, name):
    changes = list(DAMAGED.values()) if name == "all" else [DAMAGED[name]]
    tensors = load_file(deepseek / "model.safetensors")
    problems = []
    for change, found in changes:
        tensors = change(tensors)
        problems.append(found)
    save_file(tensors, deepseek / "model.safetensors")
    target = tmp_path / "x.safetensors"
    status, out, err = mhc(capfd, "convert", deepseek, target, "--to", "transformers")
    assert (status, out, err.count("\n")) == (2, "", 1)
    for problem in problems:
        assert problem in err
    assert f": {len(problems)} problem" in err
    assert not list(tmp_path.glob("*.safetensors*"))


def refused(capfd, *arguments):
    status, out, err = mhc(capfd, "convert", *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1), (status, out, err)
    return err


def test_refusals(capfd, tmp_path, deepseek):
    target = tmp_path / "x.safetensors"
    assert "needs SOURCE, TARGET and --to" in refused(capfd, deepseek, "--to", "liger")
    assert "must be one of manifold" in refused(capfd, deepseek, target, "--to", "tiger")
    suffix = refused(capfd, deepseek, tmp_path / "x", "--to", "transformers")
    assert "must end in .safetensors but is" in suffix
    assert "--to huggingface writes a run as a folder" in suffix
    assert "does not exist" in refused(capfd, tmp_path / "no", target, "--to", "liger")
    assert "1 tensors are no connections" in refused(capfd, deepseek, target, "--to", "torchtitan")
    only = (deepseek, target, "--connections-only", "--to")
    assert "cannot compute the same" in refused(capfd, *only, "megatron")
    assert "did you mean iterations" in refused(capfd, *only, "manifold", "iteration=3")
    assert "takes no other option" in refused(capfd, *only, "huggingface")
    assert not target.exists()
    assert "With --to huggingface, SOURCE is a run and TARGET" in mhc(capfd, "convert", "--help")[1]
    assert mhc(capfd, "convert", *only, "megatron", "--inexact", "--force")[0] == 0
    target.unlink()
    assert mhc(capfd, "convert", *only, "megatron_dev")[0] == 0
    before = target.read_bytes()
    assert "exists; choose another file, or give --force" in refused(capfd, *only, "manifold")
    assert target.read_bytes() == before
    assert mhc(capfd, "convert", *only, "manifold", "--force")[0] == 0
    assert target.read_bytes() != before


def test_a_pickle_that_runs_code_is_refused(capfd, tmp_path, monkeypatch):
    class Attack:
        def __reduce__(self):
            return os.mkdir, ("attacked",)

    monkeypatch.chdir(tmp_path)
    torch.save({"layers.0.hc_attn_fn": Attack()}, "x.bin")
    err = refused(capfd, "x.bin", "y.safetensors", "--to", "manifold")
    assert "a pickle can run any code" in err
    assert [path.name for path in tmp_path.iterdir()] == ["x.bin"]


def test_a_run_folder(capfd, tmp_path, text_file):
    run, target = tmp_path / "run", tmp_path / "x.safetensors"
    chosen = ["connection.streams=3", "connection.iterations=7"]
    assert mhc(capfd, "train", "--data", text_file, "--out", run, *SMALL, *chosen)[0] == 0
    weights = load_file(run / "model.safetensors")
    step = max((run / "checkpoints").glob("step-*"))
    for source in (run, step):
        arguments = [source, target, "--to", "manifold", "--force"]
        status, out, _ = mhc(capfd, "convert", *arguments)
        assert status == 0
        assert "no file gives" not in out
        assert all(torch.equal(weights[k], v) for k, v in load_file(target).items())
        found = open_checkpoint(target)
        assert (found.config.streams, found.config.iterations) == (3, 7)
        assert found.prefix == "stack."
    (run / "model.safetensors").unlink()
    assert mhc(capfd, "convert", run, target, "--to", "manifold", "--force")[0] == 0
    (step / "model.safetensors").write_bytes(b"damaged")
    assert "truncated or altered" in refused(capfd, step, target, "--to", "manifold", "--force")


def test_the_page_has_the_table_that_list_prints(capfd):
    status, out, _ = mhc(capfd, "convert", "--list")
    assert status == 0
    page = Path(__file__).parents[2] / "docs/layouts.md"
    assert out.strip() in page.read_text()
    assert all(f"| {name} |" in out for name in LAYOUTS)
