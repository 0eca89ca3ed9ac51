"""Load the data of a configuration: map shards, tokenize everything else."""

import logging
from collections.abc import Iterable

from rich.console import Console

from manifold_hc.data.config import DataConfig
from manifold_hc.data.corpus import Corpus
from manifold_hc.data.documents import Document, Skipped, documents
from manifold_hc.data.encoding import concatenate, encode
from manifold_hc.data.progress import ReadingProgress
from manifold_hc.data.python_docs import python_docs
from manifold_hc.data.shards import ShardFolder, is_shard_folder, short
from manifold_hc.data.source_files import list_files
from manifold_hc.data.tokenizer import Tokenizer, require_vocabulary, tokenizer, user_path
from manifold_hc.data.tokens import Tokens
from manifold_hc.errors import DataError
from manifold_hc.parallel import is_rank0

logger = logging.getLogger("manifold_hc")


def load(
    config: DataConfig, vocabulary: int | None = None, console: Console | None = None
) -> Corpus:
    """Load the tokens of all sources: shards are mapped, everything else is tokenized.

    Args:
        config: sources and tokenizer.
        vocabulary: size of the model's vocabulary, checked before any text is read; no check if it
            is left out.
        console: shows progress; none if left out.

    Returns:
        The corpus, one source for each of `config.paths`.

    Raises:
        DataError: for a source that is missing or not valid, for a tokenizer with more ids than
            `vocabulary`, and for shards of another tokenizer.

    Example:
        >>> from manifold_hc.data import DataConfig, load
        >>> corpus = load(DataConfig())  # Python's documentation, as bytes
        >>> corpus.vocabulary
        256
    """
    paths = [user_path(path, "data") for path in config.paths]
    folders = {path: ShardFolder(path) for path in paths if is_shard_folder(path)}
    chosen = _choose_tokenizer(config, list(folders.values()))
    for folder in folders.values():
        _require_same_tokenizer(folder, chosen, config)
    if vocabulary is not None:
        require_vocabulary(chosen.name, chosen.vocabulary, vocabulary)
    for folder in folders.values() if config.verify else ():
        folder.verify()
    if not paths:
        return Corpus([_tokenize([(python_docs(),)], chosen)], chosen.vocabulary, (), chosen.name)
    listed = {path: list_files(path) for path in paths if path not in folders}
    if listed:
        chosen.announce()
    skipped = Skipped(allowed=config.skip_broken)
    total = sum(file.stat().st_size for found in listed.values() for file in found)
    sources = []
    with ReadingProgress(console if is_rank0() else None, total) as progress:
        for path in paths:
            if path in folders:
                sources.append(Tokens(folders[path].shards))
                continue
            texts = documents(path, config.text_key, skipped, progress.advance, listed[path])
            sources.append(_tokenize(texts, chosen, str(path)))
    if skipped.reasons:
        logger.warning("data: %s", skipped)
    return Corpus(sources, chosen.vocabulary, config.weights, chosen.name)


def tokenizer_of(config: DataConfig) -> Tokenizer:
    """Return the tokenizer that `load` would use for a configuration; read no text.

    Raises DataError if it, or the shards that determine it, cannot be read.
    """
    paths = [user_path(path, "data") for path in config.paths]
    known = config.tokenizer != ""
    return _choose_tokenizer(
        config, [] if known else [ShardFolder(path) for path in paths if is_shard_folder(path)]
    )


def _require_same_tokenizer(folder: ShardFolder, chosen: Tokenizer, config: DataConfig) -> None:
    """Raise DataError if the shards have another tokenizer or boundary token."""
    index = folder.index
    if index.tokenizer != chosen.fingerprint:
        raise DataError(
            f"data: {folder.path} was made with another tokenizer "
            f"({short(index.tokenizer)}) than {chosen.name} "
            f"({short(chosen.fingerprint)}); tokenize it again or change data.tokenizer"
        )
    if config.boundary and index.boundary != chosen.boundary:
        raise DataError(
            f"data: {folder.path} has the id {index.boundary} between documents, but "
            f"data.boundary={config.boundary} is {chosen.boundary}; tokenize it again or leave "
            "data.boundary out"
        )
    if chosen.source and not index.text_as_text:
        logger.warning(
            "data: %s was made by an earlier version: a text that spells a special token became "
            "that token; tokenize it again for a new run",
            folder.path,
        )


def _tokenize(texts: Iterable[Document], chosen: Tokenizer, name: str = "") -> Tokens:
    """Tokenize the documents of one source."""
    tokens = concatenate(encode(texts, chosen))
    if not len(tokens):
        raise DataError(f"data: {name} gives no tokens with {chosen.name}; give another tokenizer")
    return Tokens([tokens])


def _choose_tokenizer(config: DataConfig, folders: list[ShardFolder]) -> Tokenizer:
    """Return the configured tokenizer, else that of the first shards, else bytes.

    Texts get the boundary token of the shards, unless the configuration names one.
    """
    if not folders:
        return tokenizer(config.tokenizer, config.boundary)
    first = folders[0]
    file = first.tokenizer_file
    name = config.tokenizer or (str(file) if file else "bytes")
    if not file or name == "bytes" or config.boundary:
        return tokenizer(name, config.boundary)
    return tokenizer(name, first.index.boundary)
