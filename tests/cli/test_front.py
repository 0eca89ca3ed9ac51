"""First commands of a new user, and the hints for typing errors."""

import importlib.util
import inspect
import os
import re
import subprocess
import sys
from dataclasses import fields

import docstring_parser
import pytest

from manifold_hc.cli import commands
from manifold_hc.cli.keys import describe
from manifold_hc.config import ConnectionConfig
from tests.cli.test_commands import SMALL, mhc

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.mark.parametrize("group", [[], ["bench"]])
def test_a_group_without_a_command_prints_its_help(capfd, group):
    status, out, err = mhc(capfd, *group)
    assert (status, out) == (2, "")
    assert err == mhc(capfd, *group, "--help")[1]


HINTS = {
    "a whole key": (["--optimizer.lr", "1e-3"], "did you mean optimizer.lr=1e-3?"),
    "the last part of a key": (["--steps", "100"], "did you mean training.steps=100?"),
    "with an equals sign": (["--lr=1e-3"], "did you mean optimizer.lr=1e-3?"),
    "with underscores": (["--init-std", "0.02"], "did you mean model.init_std=0.02?"),
    "a slip": (["--optimizer.warmpu", "7"], "did you mean optimizer.warmup=7?"),
    "a switch": (["--training.compile"], "did you mean training.compile=true?"),
    "no value": (["--steps", "--out", "x"], "did you mean training.steps=VALUE?"),
    "no equals sign": (["optimizer.lr", "1e-3"], "did you mean optimizer.lr=1e-3?"),
    "a bare word": (["steps"], "did you mean training.steps=VALUE?"),
}


@pytest.mark.parametrize("name", HINTS)
def test_a_key_typed_as_an_option_gets_a_hint(capfd, name):
    arguments, hint = HINTS[name]
    for command in ("train", "compare"):
        status, out, err = mhc(capfd, command, *arguments)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert hint in err


def test_other_options_have_clicks_hint(capfd):
    status, _, err = mhc(capfd, "train", "--resum", "x")
    assert (status, err.count("\n")) == (2, 1)
    assert "--resume" in err
    assert "key=value" not in err


WITHOUT_EFFECT = {
    "residual": ("connection.kind=residual", "connection.streams=4"),
    "hc": ("connection.kind=hc", "connection.constraint=identity"),
}


@pytest.mark.parametrize("kind", WITHOUT_EFFECT)
def test_a_key_that_the_kind_does_not_use_is_an_error(capfd, tmp_path, text_file, kind):
    chosen, pair = WITHOUT_EFFECT[kind]
    key = pair.partition("=")[0]
    wanted = f"{key}: has no effect with connection.kind={kind}; leave it out"
    status, out, err = mhc(capfd, "train", "--dry-run", pair, chosen)
    assert (status, out, err) == (2, "", f"mhc: error: {wanted}\n")
    base = ["compare", "--data", text_file, "--out", tmp_path / "c", *SMALL]
    local = f"{kind}:{pair.removeprefix('connection.')}"
    for arguments in (["--variant", local], ["--variant", kind, pair]):
        status, out, err = mhc(capfd, *base, *arguments)
        assert (status, out) == (2, "")
        assert wanted in err
    assert not (tmp_path / "c").exists()


def test_a_key_that_one_variant_uses_is_allowed(capfd, tmp_path, text_file):
    base = ["compare", "--data", text_file, "--out", tmp_path / "c", *SMALL]
    assert mhc(capfd, *base, "connection.constraint=identity")[0] == 0


@pytest.mark.parametrize("seeds", [0, 10_001, 2**64])
def test_an_invalid_number_of_seeds_is_one_line(capfd, tmp_path, text_file, seeds):
    base = ["compare", "--data", text_file, "--out", tmp_path / "c", *SMALL]
    status, _, err = mhc(capfd, *base, "--seeds", str(seeds))
    assert (status, err.count("\n")) == (2, 1)
    assert f"{seeds} is not in the range 1<=x<=10000" in err


def test_compare_takes_the_kind_from_its_variants(capfd, tmp_path, text_file):
    base = ["compare", "--data", text_file, "--out", tmp_path / "c", *SMALL]
    status, _, err = mhc(capfd, *base, "connection.kind=hc")
    assert (status, err.count("\n")) == (2, 1)
    assert "connection.kind: --variant decides it" in err
    assert not (tmp_path / "c").exists()


def test_keys_of_a_file_may_have_no_effect(capfd, tmp_path, text_file):
    run = tmp_path / "run"
    residual = ["connection.kind=residual", *SMALL]
    assert mhc(capfd, "train", "--data", text_file, "--out", run, *residual)[0] == 0
    again = ["train", "--config", run / "config.json", "--dry-run"]
    assert mhc(capfd, *again)[0] == 0
    assert mhc(capfd, *again, "connection.streams=8")[0] == 2
    assert mhc(capfd, *again, "connection.kind=mhc", "connection.streams=8")[0] == 0


def test_every_command_has_an_example(capfd):
    def leaves(group, path):
        for name, command in group.commands.items():
            yield [*path, name]
            yield from leaves(command, [*path, name]) if hasattr(command, "commands") else ()

    for path in leaves(commands, []):
        status, out, _ = mhc(capfd, *path, "--help")
        assert status == 0
        assert f"\n  mhc {' '.join(path)}" in out


@pytest.mark.parametrize("installed", [True, False])
def test_info_lists_the_usable_backends(capfd, monkeypatch, installed):
    import torch

    known, find_spec = {"triton": object() if installed else None}, importlib.util.find_spec

    def find(name):
        return known[name] if name in known else find_spec(name)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (row,) = [line for line in mhc(capfd, "info")[1].splitlines() if line.startswith("backends")]
    why = "torch finds no GPU" if installed else "Triton is not installed"
    assert row.split(maxsplit=1)[1].strip() == f"cpu, reference; triton not usable: {why}"


ASCII = {
    "LC_ALL": "C",
    "PYTHONCOERCECLOCALE": "0",
    "PYTHONUTF8": "0",
    "PYTHONIOENCODING": "ascii",  # without the locale's surrogates
}


def test_output_in_an_ascii_locale(capfd, tmp_path, text_file):
    folder = tmp_path / "läufe"
    base = ["compare", "--data", text_file, "--out", folder, *SMALL, "training.steps=1"]
    assert mhc(capfd, *base, "--variant", "residual", "--seeds", "2")[0] == 0
    found = subprocess.run(
        [sys.executable, "-m", "manifold_hc", "report", folder],
        env=os.environ | ASCII,
        capture_output=True,
    )
    assert (found.returncode, found.stderr) == (0, b"")
    assert b" +- " in found.stdout
    assert b"report: " in found.stdout
    assert "läufe" in (folder / "report.html").read_text(encoding="utf-8")


def test_every_field_is_documented_in_python():
    """The class's docstring, which help() shows, has the sentence of every field."""
    docs = {p.arg_name: p for p in docstring_parser.parse(ConnectionConfig.__doc__).params}
    listed = {key: sentence for key, _, sentence in describe(ConnectionConfig())}
    assert docs.keys() == listed.keys() == {f.name for f in fields(ConnectionConfig)}
    at_fields = re.findall(r'\n    (\w+): .*\n    """(.*)"""', inspect.getsource(ConnectionConfig))
    assert {name: " ".join(docs[name].description.split()) for name in docs} == dict(at_fields)
    assert all(listed[name].startswith(sentence) for name, sentence in at_fields)
