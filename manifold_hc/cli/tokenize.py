"""`mhc tokenize`."""

import shutil
import time
from pathlib import Path

import click
import msgspec
from rich.table import Table

from manifold_hc.cli.options import json_option
from manifold_hc.cli.terminal import console
from manifold_hc.data.shards import SHARD_TOKENS
from manifold_hc.errors import DataError, ManifoldError, RunFolderError
from manifold_hc.files import write_atomically


@click.command()
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder for the shards; must be new or empty.",
)
@click.option(
    "--tokenizer",
    "name",
    default="bytes",
    show_default=True,
    metavar="FILE",
    help="A tokenizer.json, or bytes.",
)
@click.option(
    "--boundary", default="", metavar="TOKEN", help="Token between documents, if not the usual one."
)
@click.option(
    "--text-key",
    default="text",
    show_default=True,
    metavar="KEY",
    help="Key of the text in JSON lines, column of the text in Parquet.",
)
@click.option(
    "--shard-tokens",
    type=click.IntRange(min=1),
    default=SHARD_TOKENS,
    show_default=True,
    help="Tokens in a shard; no document is cut.",
)
@json_option
def tokenize(
    sources: tuple[Path, ...],
    out: Path,
    name: str,
    boundary: str,
    text_key: str,
    shard_tokens: int,
    json_file: Path | None,
) -> None:
    """Turn texts into shards of token ids, which training maps instead of reading.

    \b
    mhc tokenize books/ more.jsonl --tokenizer tokenizer.json --out shards/books
    mhc train --data shards/books model.vocabulary=32768
    """
    from manifold_hc.data.documents import documents
    from manifold_hc.data.shards import is_shards, write
    from manifold_hc.data.tokenizer import tokenizer
    from manifold_hc.training.folder import is_empty

    for source in sources:
        if is_shards(source):
            raise DataError(f"tokenize: {source} is tokenized already; give its text")
    if not is_empty(out) or out.is_file():
        raise RunFolderError(f"tokenize: {out} is not empty; choose another with --out")
    chosen = tokenizer(name, boundary)
    start = time.perf_counter()
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise RunFolderError(
            f"tokenize: {out} cannot be made ({error.strerror}); choose another with --out"
        ) from None
    try:
        texts = (text for source in sources for text in documents(source, text_key))
        index = write(texts, chosen, unfinished, shard_tokens)
        if out.is_dir():
            out.rmdir()
        unfinished.rename(out)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, OSError):
            raise ManifoldError(f"tokenize: {out} cannot be written: {error.strerror}") from None
        raise
    seconds = time.perf_counter() - start
    figures = {
        "documents": index.documents,
        "tokens": index.tokens,
        "shards": len(index.shards),
        "vocabulary": index.vocabulary,
        "tokens_per_second": index.tokens / seconds,
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    for label, value in figures.items():
        table.add_row(label.replace("_", " "), f"{value:,.0f}")
    console().print(table)
    click.echo(f"shards: {out}")
    if json_file:
        write_atomically(json_file, msgspec.json.format(msgspec.json.encode(figures)))
