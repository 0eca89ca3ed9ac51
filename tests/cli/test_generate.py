"""`mhc generate`: its output and its refusals."""

import io
import json
import subprocess
import sys

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from manifold_hc import extras
from manifold_hc.cli import main
from manifold_hc.data.tokenizer import ByteTokenizer
from manifold_hc.interop.huggingface import as_transformers
from manifold_hc.models import Decoder
from tests.cli.test_commands import SMALL, mhc
from tests.conftest import generated_text

command = sys.modules["manifold_hc.cli.generate"]
pytestmark = pytest.mark.usefixtures("unchecked")

GREEDY = ("--temperature", 0, "--max-tokens", 12)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run over bytes that has learned to write letters."""
    folder = tmp_path_factory.mktemp("generate")
    (folder / "text.txt").write_text(generated_text(3_000))
    learns = ["training.steps=40", "optimizer.warmup=1", "optimizer.lr=0.02"]
    data = ["--data", str(folder / "text.txt")]
    main(["train", *data, "--out", str(folder / "run"), *SMALL, *learns])
    return folder / "run"


def texts(file):
    return json.loads(file.read_text())["texts"]


def test_one_prompt_is_streamed_and_written(capfd, run, tmp_path, monkeypatch):
    pieces = []
    monkeypatch.setattr(command, "_print", pieces.append)
    file = tmp_path / "texts.json"
    status, _, _ = mhc(capfd, "generate", run, "--prompt", "It é", "--seed", 3, "--json", file)
    assert status == 0
    written = json.loads(file.read_text())
    (text,) = written["texts"]
    assert pieces[0] == "It é"
    assert pieces[-1] == "\n"
    assert len(pieces) > 150
    assert "".join(pieces[1:-1]) == text["text"]
    assert (text["prompt"], text["prompt_tokens"], text["tokens"]) == ("It é", 5, 200)
    assert written["settings"] == {
        "max_tokens": 200,
        "temperature": 1.0,
        "top_p": 1.0,
        "seed": 3,
        "cache": True,
        "batch": 8,
        "step": None,
    }
    assert written["device"] == "cpu"


def test_seeds_and_the_cache(capfd, run):
    def out(*options):
        status, out, _ = mhc(
            capfd, "generate", run, "--prompt", "ae", "--max-tokens", 12, "--device=cpu", *options
        )
        assert status == 0
        return out

    first = out("--seed", 1)
    assert first.startswith("ae")
    assert out("--seed", 1) == first
    assert out("--seed", 1, "--no-cache") == first
    assert out("--seed", 2) != first
    greedy = out("--temperature", 0)
    assert out("--temperature", 0, "--seed", 5) == greedy
    assert out("--top-p", 1e-9, "--seed", 5) == greedy
    assert out("--temperature", 0, "--step", 40) == greedy


def test_several_prompts_in_batches_with_padding(capfd, run, tmp_path):
    prompts = ["a", "It was é", "nrst nrst", " x"]
    (tmp_path / "prompts.txt").write_text("".join(f"{text}\r\n" for text in prompts[1:]))
    given = ("--prompt", "a", "--prompts", tmp_path / "prompts.txt", *GREEDY)
    alone = []
    for prompt in prompts:
        _, out, _ = mhc(capfd, "generate", run, "--prompt", prompt, *GREEDY)
        alone.append(out.removesuffix("\n"))
    for batch in (1, 3):
        file = tmp_path / f"{batch}.json"
        status, out, _ = mhc(capfd, "generate", run, *given, "--batch", batch, "--json", file)
        assert status == 0
        assert out == "".join(f"{text}\n{command.SEPARATOR}\n" for text in alone)
        assert [text["prompt"] for text in texts(file)] == prompts
        assert [text["prompt"] + text["text"] for text in texts(file)] == alone


def test_blank_lines_and_a_byte_order_mark_are_no_prompts(capfd, run, tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfIt\r\n\r\n  \nShe \n\n")
    file = tmp_path / "texts.json"
    given = ("--prompts", tmp_path / "prompts.txt", *GREEDY, "--json", file)
    assert mhc(capfd, "generate", run, *given)[0] == 0
    assert [text["prompt"] for text in texts(file)] == ["It", "She "]


def test_log_lines_of_the_first_pass_come_before_the_text(run, monkeypatch):
    """Also for a model that writes nothing but an end."""
    events = []
    monkeypatch.setattr(command, "_print", events.append)
    forward = Decoder.forward

    def logging(*args, **options):
        events.append("log")
        return forward(*args, **options)

    monkeypatch.setattr(Decoder, "forward", logging)
    main(["generate", str(run), "--prompt", "It", "--max-tokens", "2"])
    assert events[:2] == ["log", "It"]
    events.clear()
    stream = command._Stream("It")
    stream.write("\n")
    assert events == ["It", "\n"]


def test_a_text_beyond_the_context_is_refused(capfd, tmp_path):
    config = GPT2Config(vocab_size=256, n_positions=32, n_embd=16, n_head=2, n_layer=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    as_transformers(ByteTokenizer()).save_pretrained(tmp_path)
    status, out, err = mhc(
        capfd, "generate", tmp_path, "--prompt", "First Citizen", "--max-tokens", 100
    )
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert "context length of the model is 32" in err
    assert "use --max-tokens 19" in err
    (tmp_path / "prompts.txt").write_text(f"It\n\n{'It was ' * 5}\n")
    status, out, err = mhc(capfd, "generate", tmp_path, "--prompts", tmp_path / "prompts.txt")
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert "prompts.txt, line 3: has 35 tokens" in err


def test_mistakes_end_with_one_line_and_status_2(capfd, run, tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.txt").write_text("\n \t\n")
    (tmp_path / "latin.txt").write_bytes(b"a\r\nb\n\ncaf\xe9")
    prompt = ("--prompt", "a")
    for arguments, message in {
        (run,): "there is no prompt; give --prompt TEXT or --prompts FILE",
        (run, "--prompt", ""): "prompt 1 is empty",
        (run, "--prompt", "\udcff"): "prompt 1 is not UTF-8",
        (run, "--prompts", tmp_path / "absent.txt"): "absent.txt cannot be read: No such file",
        (run, "--prompts", tmp_path): "cannot be read: is not a regular file",
        (run, "--prompts", tmp_path / "empty.txt"): "there is no prompt",
        (run, "--prompts", tmp_path / "blank.txt"): "there is no prompt",
        (run, "--prompts", tmp_path / "latin.txt"): "latin.txt is not UTF-8 at byte 9, in line 4",
        (run, *prompt, "--temperature", -1): "temperature: must be a number from 0 on",
        (run, *prompt, "--temperature", "nan"): "temperature: must be a number from 0 on",
        (run, *prompt, "--top-p", 0): "top_p: must be above 0 and at most 1",
        (run, *prompt, "--top-p", 1.01): "top_p: must be above 0 and at most 1",
        (run, *prompt, "--max-tokens", 0): "max_tokens: must be at least 1",
        (run, *prompt, "--batch", 0): "Invalid value for '--batch'",
        (run, *prompt, "--seed", -1): "seed: must be from 0",
        (run, *prompt, "--step", 2): "has none of step 2; there are: 40",
        (tmp_path / "absent", *prompt): "absent does not exist",
        (tmp_path, *prompt): "has no config.json",
        (run / "checkpoints", *prompt): "has no config.json",
    }.items():
        status, out, err = mhc(capfd, "generate", *arguments)
        assert (status, out, err.count("\n")) == (2, "", 1), err
        assert message in err


def test_transformers_is_needed_by_this_command_alone(capfd, run, monkeypatch):
    code = "import sys, manifold_hc.cli; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    status, out, err = mhc(capfd, "generate", run, "--prompt", "a")
    assert (status, out) == (1, "")
    assert "mhc generate needs transformers; install with: pip install 'manifold-hc[tr" in err


def test_text_is_written_at_once(monkeypatch):
    class Terminal(io.StringIO):
        flushed = ""

        def flush(self):
            self.flushed = self.getvalue()

    monkeypatch.setattr(sys, "stdout", Terminal())
    command._print("é")
    assert sys.stdout.flushed == "é"
