"""`mhc tokenize`: write shards."""

import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import msgspec
from rich.table import Table

from manifold_hc.cli.options import json_option
from manifold_hc.cli.terminal import console
from manifold_hc.data.shard_writer import SHARD_TOKENS
from manifold_hc.errors import DataError, RunFolderError
from manifold_hc.files import becoming, write_atomically

logger = logging.getLogger("manifold_hc")


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
@click.option(
    "--skip-broken",
    is_flag=True,
    help="Leave out rows that cannot be read, and count them; the first one is an error otherwise.",
)
@json_option
def tokenize(
    sources: tuple[Path, ...],
    out: Path,
    name: str,
    boundary: str,
    text_key: str,
    shard_tokens: int,
    skip_broken: bool,
    json_file: Path | None,
) -> None:
    """Tokenize texts into shards, which training memory-maps.

    \b
    mhc tokenize books/ more.jsonl --tokenizer tokenizer.json --out shards/books
    mhc train --data shards/books model.vocabulary=32768
    """
    from manifold_hc.data.documents import Skipped, documents
    from manifold_hc.data.progress import ReadingProgress
    from manifold_hc.data.shard_writer import write
    from manifold_hc.data.shards import is_shard_folder
    from manifold_hc.data.source_files import list_files
    from manifold_hc.data.tokenizer import tokenizer
    from manifold_hc.training.folder import is_empty

    for source in sources:
        if is_shard_folder(source):
            raise DataError(f"tokenize: {source} is tokenized already; give its text")
    if not is_empty(out) or out.is_file():
        raise RunFolderError(f"tokenize: {out} is not empty; choose another with --out")
    chosen = tokenizer(name, boundary)
    listed = {source: list_files(source) for source in sources}
    total = sum(file.stat().st_size for found in listed.values() for file in found)
    chosen.announce()
    skipped = Skipped(allowed=skip_broken)
    start = time.perf_counter()
    with _new_folder(out) as folder, ReadingProgress(console(stderr=True), total) as progress:
        texts = (
            text
            for source in sources
            for text in documents(source, text_key, skipped, progress.advance, listed[source])
        )
        index = write(texts, chosen, folder, shard_tokens, skipped)
    seconds = time.perf_counter() - start
    figures = {
        "documents": index.documents,
        "tokens": index.tokens,
        "shards": len(index.shards),
        "vocabulary": index.vocabulary,
        "broken_rows": skipped.reasons.total(),
        "tokens_per_second": index.tokens / seconds,
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    for label, value in figures.items():
        table.add_row(label.replace("_", " "), f"{value:,.0f}")
    if chosen.boundary is not None:
        table.add_row("between documents", f"{chosen.boundary_name} (id {chosen.boundary})")
    console().print(table)
    if skipped.reasons:
        logger.warning("tokenize: %s", skipped)
    click.echo(f"shards: {out}")
    if json_file:
        write_atomically(json_file, msgspec.json.format(msgspec.json.encode(figures)))


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Create a temporary folder, which becomes `out` at the end; an error removes it."""
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise RunFolderError(
            f"tokenize: {out} cannot be made ({error.strerror}); choose another with --out"
        ) from None
    with becoming(out, unfinished, "tokenize"):
        yield unfinished
