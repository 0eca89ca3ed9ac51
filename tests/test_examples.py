"""Every example runs and has the results that it describes."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name):
    """The example as a module; a class in it may need the module by its name."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_has_a_test_and_says_how_it_is_run():
    files = {file.stem: file.read_text() for file in EXAMPLES.glob("*.py")}
    tests = Path(__file__).read_text()
    for name, text in files.items():
        assert f'"{name}' in tests
        assert f"examples/{name}.py" in text.partition('"""')[2].partition('"""')[0]


def test_nanogpt_starts_alike_in_all_ways_and_learns():
    example = load("nanogpt")
    data = example.text_or_sums(None)
    losses = {}
    for way in example.BLOCKS:
        torch.manual_seed(0)
        model = example.GPT(way)
        torch.manual_seed(1)
        losses[way] = example.train(model, data, steps=8)
    for way in ("connection", "stack", "functions"):
        assert losses[way][0] == pytest.approx(losses["residual"][0], abs=1e-5)
        assert losses[way][-1] == pytest.approx(losses["connection"][-1], abs=1e-3)
        assert losses[way][-1] < losses[way][0] - 0.5


def test_nanogpt_trains_on_a_text_from_the_command_line(text_file):
    script = EXAMPLES / "nanogpt.py"
    out = run(sys.executable, script, "--way", "stack", "--text", text_file, "--steps", "6")
    first, last = (float(figure) for figure in re.findall(r"\d+\.\d+", out))
    assert last < first


def test_watch_gain_bounds_mhc_but_not_hc():
    example = load("watch_gain")
    hc, mhc = example.watch("hc"), example.watch("mhc")
    assert all(row["forward"] == pytest.approx(1, abs=1e-5) for row in mhc)
    assert max(abs(row["forward"] - 1) for row in hc) > 0.01
    for rows in (hc, mhc):
        assert rows[-1]["loss"] < rows[0]["loss"] / 2


def test_deepseek_v4_weights_agrees_with_transformers():
    pytest.importorskip("transformers")
    for share in load("deepseek_v4_weights").compare().values():
        assert share < 1e-5


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_pipeline_two_stages_gives_the_loss_and_gradients_of_one_process():
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    out = run(*launch, EXAMPLES / "pipeline_two_stages.py")
    in_stages, whole = map(float, re.findall(r"\d+\.\d{6}", out))
    assert in_stages == pytest.approx(whole, rel=1e-6)
    differences = [float(share) for share in re.findall(r"at most (\S+)", out)]
    assert len(differences) == 2
    assert max(differences) < 1e-4


def test_retrofit_starts_alike_and_learns():
    pytest.importorskip("transformers")
    arguments = ["--steps", "8", "--length", "32", "--lr", "1e-2", "--connection-lr", "1e-2"]
    found = load("retrofit").main(arguments)
    starts = [losses[0] for seeds in found.values() for losses in seeds]
    assert starts == pytest.approx([starts[0]] * len(starts), rel=1e-6)
    for seeds in found.values():
        assert all(after < before for before, after in seeds)
    assert found["mhc"][0][1] < found["mhc, connections only"][0][1]
