"""`mhc generate`: continue texts."""

import io
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import click
import msgspec

from manifold_hc.cli.options import device_option, json_option
from manifold_hc.errors import DataError
from manifold_hc.extras import require
from manifold_hc.files import is_utf8, read_regular, write_atomically

BYTE_ORDER_MARK = "\ufeff"
"""First character of some UTF-8 files, which is no text."""

SEPARATOR = "-" * 40
"""Line between the texts of several prompts."""


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--prompt", multiple=True, metavar="TEXT", help="Text to continue; may be repeated.")
@click.option(
    "--prompts",
    "file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Texts to continue, one a line; blank lines are skipped.",
)
@click.option(
    "--max-tokens", type=int, default=200, show_default=True, help="Most new tokens per prompt."
)
@click.option(
    "--temperature",
    type=float,
    default=1.0,
    show_default=True,
    help="Divisor of the logits; 0 takes the most likely token.",
)
@click.option(
    "--top-p",
    type=float,
    default=1.0,
    show_default=True,
    help="Sample from the most likely tokens that have this share of the probability.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the sampling.")
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Prompts that are continued at once.",
)
@click.option("--step", type=int, metavar="N", help="Checkpoint of the run.  [default: newest]")
@click.option("--no-cache", is_flag=True, help="Recompute the whole text for every token.")
@device_option
@json_option
def generate(
    folder: Path,
    prompt: tuple[str, ...],
    file: Path | None,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    batch: int,
    step: int | None,
    no_cache: bool,
    device: str,
    json_file: Path | None,
) -> None:
    """Continue texts with a trained model.

    \b
    mhc generate runs/book --prompt "It was"
    mhc generate runs/book --prompts prompts.txt --temperature 0 --json texts.json

    FOLDER is a run of mhc train, an exported model, or any model folder that transformers loads as
    a causal language model. One prompt is streamed; several are continued in batches and printed
    when a batch is done. A text ends with its document or after --max-tokens. The prompt is part of
    the output.
    """
    require("mhc generate", "transformers")
    from transformers.utils import logging

    from manifold_hc.interop.huggingface import Sampling, continue_texts, open_model

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    sampling = Sampling(max_tokens, temperature, top_p, seed, not no_cache)
    prompts = {f"prompt {number}": text for number, text in enumerate(prompt, 1)}
    prompts |= _read_prompts(file) if file else {}
    _require_prompts(prompts)
    texts = list(prompts.values())
    model, tokenizer = open_model(folder, step=step, device=device)
    stream = _Stream(texts[0]) if len(texts) == 1 else None
    continued = continue_texts(
        model,
        tokenizer,
        texts,
        sampling,
        batch=batch,
        on_text=stream.write if stream else None,
        names=list(prompts),
    )
    done = []
    for made in continued:
        if stream:
            stream.write("\n")
        else:
            _print(f"{made.prompt}{made.text}\n{SEPARATOR}\n")
        done.append(made)
    if json_file:
        content = {
            "model": str(folder),
            "device": str(model.device),
            "settings": {**asdict(sampling), "batch": batch, "step": step},
            "texts": [asdict(made) for made in done],
        }
        write_atomically(json_file, msgspec.json.format(msgspec.json.encode(content)))


class _Stream:
    """Writes a prompt with its first new text, after the log lines of the model's first pass."""

    def __init__(self, prompt: str) -> None:
        self._prompt = prompt

    def write(self, text: str) -> None:
        """Write new text, and the prompt before the first of it."""
        if self._prompt:
            _print(self._prompt)
            self._prompt = ""
        _print(text)


def _print(text: str) -> None:
    """Write to standard output at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def _read_prompts(file: Path) -> dict[str, str]:
    """Return the lines of a file that are not blank, by file and line; DataError if unreadable."""
    content = b""
    try:
        content = read_regular(file)
        lines = io.StringIO(content.decode().removeprefix(BYTE_ORDER_MARK), newline=None)
    except OSError as error:
        raise DataError(f"--prompts: {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = len(io.StringIO(content[: error.start].decode() + "?", newline=None).readlines())
        raise DataError(
            f"--prompts: {file} is not UTF-8 at byte {error.start}, in line {line}; "
            "convert it to UTF-8"
        ) from None
    return {
        f"{file}, line {number}": line.removesuffix("\n")
        for number, line in enumerate(lines, 1)
        if line.strip()
    }


def _require_prompts(prompts: Mapping[str, str]) -> None:
    """Raise DataError unless there are prompts, all with text."""
    if not prompts:
        raise DataError("generate: there is no prompt; give --prompt TEXT or --prompts FILE")
    for name, text in prompts.items():
        if not text:
            raise DataError(f"generate: {name} is empty; give at least one character")
        if not is_utf8(text):
            raise DataError(f"generate: {name} is not UTF-8: {text!r}")
