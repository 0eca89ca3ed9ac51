"""Code blocks, links and layout of README, CONTRIBUTING and docs.

| block | test |
|---|---|
| ```python | runs; the blocks of a page share their names; `>>>` is compared as doctest does |
| ```bash | runs, `mhc train` and `mhc compare` with a small model and few steps |
| ```bash dry | needs minutes, the network, several processes or a GPU: its lines are parsed |
| ```diff, ```text, ```json | not run; the README's diff has a test of its own |
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import fields
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
import torch
from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser
from torch import nn

import manifold_hc as mhc
from manifold_hc.cli import commands, main
from manifold_hc.cli.options import Wanted
from manifold_hc.errors import ConfigError
from tests.conftest import generated_text

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
LANGUAGES = {"python", "bash", "bash dry", "diff", "text", "json"}
WRITTEN_OTHERWISE = ("benchmarks.md", "lab-log.md")
"""Pages without the rules of layout: one is generated, one is a dated record."""

NEEDED = {"lightning.md": ["lightning"], "lucidrains.md": ["hyper_connections"]}
"""Packages of a page's blocks that the test extra need not bring."""

SMALL = [
    "model.channels=16",
    "model.blocks=2",
    "model.feed_forward=16",
    "data.sequence=16",
    "training.batch=2",
    "training.validation_batches=1",
    "checkpoint.best=false",
]

every_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)


@pytest.fixture
def folder(tmp_path, monkeypatch, bpe):
    """A folder with the files that the commands of the pages name; the working directory."""
    text = generated_text(6_000)
    (tmp_path / "books").mkdir()
    for name in ("book.txt", "books/one.txt", "books/two.txt"):
        (tmp_path / name).write_text(text)
    for name in ("more.jsonl", "code.jsonl"):
        (tmp_path / name).write_text(f'{{"text": "{text[:2000].replace(chr(10), " ")}"}}\n' * 3)
    shutil.copy(bpe(300), tmp_path / "tokenizer.json")
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def blocks():
    """A function that maps a page to its code blocks, in order."""
    parsers = [
        PythonCodeBlockParser(),
        CodeBlockParser("bash", run_commands),
        CodeBlockParser("bash dry", parse_commands),
    ]
    return lambda page: Sybil(parsers, path=str(ROOT)).parse(page).examples()


@every_page
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:Found keys that are in the model state dict")
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning")
def test_blocks_run(page, blocks, folder, unchecked):
    for package in NEEDED.get(page.name, ()):
        pytest.importorskip(package)
    for block in blocks(page):
        block.evaluate()


@every_page
def test_code_is_fenced_and_its_language_is_known(page):
    fenced, before = False, ""
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if match := re.match(r"\s*(?:> )?```(.*)", line):
            fenced = not fenced
            assert not fenced or match[1] in LANGUAGES, f"{page.name}:{number}"
        elif not fenced and not before.strip():
            assert not line.startswith("    "), f"{page.name}:{number}: indented code"
        before = line
    assert not fenced


@every_page
def test_links_have_a_file_and_a_heading(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


@every_page
def test_prose_is_wrapped_and_caveats_have_one_form(page):
    if page.name in WRITTEN_OTHERWISE:
        return
    text = prose_of(page)
    for line in text.splitlines():
        assert len(line) <= 100 or line.startswith(("|", "![")), line
    for box in re.findall(r"^> (?:\*\*|\[!)(.*)", text, re.MULTILINE):
        assert box in ("NOTE]", "WARNING]"), box


def test_the_index_names_every_page():
    index = ROOT / "docs/README.md"
    for page in index.parent.glob("*.md"):
        assert page == index or f"({page.name})" in index.read_text()


def test_the_architecture_page_names_files_that_exist():
    page = (ROOT / "docs/architecture.md").read_text()
    for name in re.findall(r"`([\w./]+(?:\.py|\.cpp|\.toml|/))`", page):
        assert (ROOT / name).exists() or (ROOT / "manifold_hc" / name).exists(), name


def test_the_readmes_first_block_prints_gains_in_an_empty_folder(tmp_path):
    block = next(iter(fences("python")))
    (tmp_path / "first.py").write_text(block)
    done = subprocess.run(
        [sys.executable, "-W", "error", "first.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    forward, backward = (float(figure) for figure in re.findall(r"\d\.\d+", done.stdout))
    assert forward == pytest.approx(1, abs=1e-3)
    assert backward == pytest.approx(1, abs=0.05)
    assert len(list(filter(None, block.splitlines()))) <= 16


def test_the_readmes_diff_gives_a_block_that_starts_as_the_old_one():
    diff = next(iter(fences("diff")))
    block, rest = diff.split(" # GPT.__init__\n")
    _, rest = rest.split(" # GPT.forward\n")

    class CausalSelfAttention(nn.Linear):
        def __init__(self, config):
            super().__init__(config.n_embd, config.n_embd)

    class GPT(nn.Module):
        def __init__(self, Block, *layer):
            super().__init__()
            h = nn.ModuleList(Block(config, *layer[: i + 1][-1:]) for i in range(3))
            self.transformer = nn.ModuleDict({"drop": nn.Identity(), "h": h, "ln_f": nn.Identity()})

    config = SimpleNamespace(n_embd=8, bias=False)
    outputs, weights = [], []
    for side, layers in (("-", ()), ("+", (0, 1, 2))):
        names = {
            "nn": nn,
            "LayerNorm": lambda C, bias: nn.LayerNorm(C, bias=bias),
            "CausalSelfAttention": CausalSelfAttention,
            "MLP": CausalSelfAttention,
        }
        exec(one_side(block, side), names)
        torch.manual_seed(0)
        gpt = GPT(names["Block"], *layers)
        weights.append(gpt.state_dict())
        names |= {"self": gpt, "tok_emb": torch.randn(2, 5, 8), "pos_emb": torch.randn(5, 8)}
        exec(one_side(rest, side), names)
        outputs.append(names["x"])
    torch.testing.assert_close(*outputs)
    # The README's way past the assertion of nanoGPT's from_pretrained, and strict=False.
    (filtered,) = re.findall(r"`(sd_keys = .*?)`", (ROOT / "README.md").read_text())
    names = {"sd_keys": weights[1].keys()}
    exec(filtered, names)
    assert set(names["sd_keys"]) == weights[0].keys() < weights[1].keys()
    assert not gpt.load_state_dict(weights[0], strict=False).unexpected_keys


def test_a_marked_command_with_a_mistake_is_found(folder):
    for line in (
        "mhc train trainin.steps=3",
        "mhc trian",
        "mhc bench ops --tokens many",
        "torchrun --processes 2 -m manifold_hc train",
        "make tests",
        "pip install 'manifold-hc[gpu]'",
        "python examples/absent.py",
        "nothing --known",
        "torchrun -m torchtitan.train --module manifold_hc.interop.torchtitan --config mhc_3",
        "torchrun -m torchtitan.train --module manifold_hc.interop.torchtitan --config mhc_3b "
        "--connection.stream 2",
    ):
        with pytest.raises((click.ClickException, ConfigError, AssertionError, SystemExit)):
            parse_line(line)


def prose_of(page):
    """The text of a page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors_of(page):
    """The anchors that GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", prose_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def fences(language, page=ROOT / "README.md"):
    """The sources of the blocks in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def one_side(diff, side):
    """The lines of a diff on one side, "-" or "+", without the marks and the common indent."""
    lines = [line[1:] for line in diff.splitlines() if line[:1] in ("", " ", side)]
    indent = len(lines[0]) - len(lines[0].lstrip())
    return "\n".join(line[indent:] for line in lines)


def lines_of(script):
    """The commands of a script, without comments and line continuations."""
    joined = re.sub(r"\\\n\s*", "", script)
    return [line for line in joined.splitlines() if shlex.split(line, comments=True)]


def run_commands(block):
    """Run the commands of a block, all of which must be commands of mhc."""
    for line in lines_of(block.parsed):
        words = shlex.split(line, comments=True)
        assert words[0] == "mhc", f"{line!r}: only mhc is run here; mark the block: bash dry"
        try:
            main(shrunk(words[1:]))
        except SystemExit as stop:
            raise AssertionError(f"{line!r} ended with status {stop.code}") from None


def shrunk(arguments):
    """The same command with a small model; a resumed run makes one step more than it has."""
    if arguments[0] not in ("train", "compare") or {"--dry-run", "--help"} & set(arguments):
        return arguments
    if "--resume" not in arguments:
        experts = ["model.experts.width=16"] if "tiny-moe" in arguments else []
        return [*arguments, *SMALL, *experts, "training.steps=2"]
    run = Path(arguments[arguments.index("--resume") + 1])
    done = len((run / "metrics.jsonl").read_text().splitlines())
    return [*arguments, f"training.steps={done + 1}"]


def parse_commands(block):
    """Parse the command lines of a block, or the command that a script would start."""
    if block.parsed.startswith("#!"):
        parse_line(shlex.join(job_of(block.parsed)))
        return
    for line in lines_of(block.parsed):
        parse_line(line)


def job_of(script):
    """The command that a Slurm script hands to srun."""
    stubs = 'scontrol() { echo node; }; srun() { printf "%s\\n" "$@"; }; set -eu\n'
    command = ["bash", "-c", stubs + script]
    done = subprocess.run(
        command,
        env={"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


MODULES = {"manifold_hc": "mhc", "torchtitan.train": "torchtitan"}
"""Programs by the module that torchrun runs."""


def parse_line(line):
    """Raise for a command line that its program would refuse."""
    words = shlex.split(line, comments=True)
    words = words[len(list(takewhile(lambda word: re.match(r"\w+=", word), words))) :]
    program, *rest = words
    if program == "torchrun":
        from torch.distributed.run import get_args_parser

        options = get_args_parser().parse_args(rest)
        program, rest = options.training_script, options.training_script_args
        program = MODULES[program] if options.module else program
    elif program == "python" and rest[:2] == ["-m", "manifold_hc"]:
        program, rest = "mhc", rest[2:]
    if program == "mhc":
        parse_mhc(rest)
    elif program == "torchtitan":
        parse_torchtitan(rest)
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in rest if "=" not in word} <= set(targets), line
    elif program == "pip":
        parse_pip(rest)
    elif program.endswith(".py"):
        assert (ROOT / program).exists(), program
    elif program in ("python", "pytest") and rest[0].endswith(".py"):
        assert (ROOT / rest[0]).exists(), line
    else:
        known = ("git clone ", "git tag ")
        assert line.startswith(known), f"{line!r}: unknown program"


def parse_torchtitan(arguments):
    """Names of a configuration and of fields of the connections; torchtitan may be missing."""
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    registry = ROOT / given["--module"].replace(".", "/") / "config_registry.py"
    assert f"\ndef {given['--config']}(" in registry.read_text()
    known = {f"--connection.{field.name}" for field in fields(mhc.ConnectionConfig)}
    assert {name for name in given if name.startswith("--connection.")} <= known


def parse_mhc(arguments):
    command, rest = commands, list(arguments)
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        found = command.get_command(click.Context(command), rest[0])
        assert found, f"mhc {' '.join(arguments)}: no command {rest[0]!r}"
        command, rest = found, rest[1:]
    if "--help" in rest:
        return
    if "--resume" in rest:
        Path(rest[rest.index("--resume") + 1]).mkdir(parents=True, exist_ok=True)
    given = command.make_context("mhc", rest).params
    if "overrides" in given:
        Wanted(given["preset"], None, given["data"], given["overrides"]).config()


def parse_pip(words):
    """Extras that the package has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].keys()
    for name in re.findall(r"(?:manifold-hc|\.)\[([\w,-]+)\]", " ".join(words)):
        assert set(name.split(",")) <= extras, f"manifold-hc has no extra {name!r}"
    assert words[0] == "install"
