"""From a configuration to tokens."""

from collections.abc import Iterable
from pathlib import Path

from manifold_hc.data.config import DataConfig
from manifold_hc.data.documentation import documentation
from manifold_hc.data.documents import documents
from manifold_hc.data.shards import ShardFolder, encode, is_shards, joined, short
from manifold_hc.data.tokenizer import Tokenizer, tokenizer
from manifold_hc.data.tokens import ArrayPart, Corpus, Tokens
from manifold_hc.errors import DataError


def load(config: DataConfig) -> Corpus:
    """The tokens of all sources: shards are mapped, anything else is tokenized now.

    Raises DataError for a source that cannot be used, or shards of another tokenizer.
    """
    paths = [Path(path).expanduser() for path in config.paths]
    folders = {path: ShardFolder(path) for path in paths if is_shards(path)}
    chosen = _tokenizer(config, list(folders.values()))
    for folder in folders.values():
        if folder.index.tokenizer != chosen.fingerprint:
            raise DataError(
                f"data: {folder.path} was made with another tokenizer "
                f"({short(folder.index.tokenizer)}) than {chosen.name} "
                f"({short(chosen.fingerprint)}); tokenize it again or change data.tokenizer"
            )
        if config.verify:
            folder.verify()
    sources = [
        Tokens(folders[path].shards)
        if path in folders
        else _in_memory(documents(path, config.text_key), chosen)
        for path in paths
    ]
    if not paths:
        sources = [_in_memory([documentation()], chosen)]
    return Corpus(sources, chosen.vocabulary, config.weights, chosen.name)


def _in_memory(texts: Iterable[str], chosen: Tokenizer) -> Tokens:
    """One source of documents, tokenized now."""
    ids, starts = joined(list(encode(texts, chosen)))
    return Tokens([ArrayPart(ids, starts)])


def _tokenizer(config: DataConfig, folders: list[ShardFolder]) -> Tokenizer:
    """The one that is named, or that the first shards were made with, or bytes."""
    if not config.tokenizer and folders:
        file = folders[0].tokenizer_file
        return tokenizer(str(file) if file else "bytes", config.boundary)
    return tokenizer(config.tokenizer, config.boundary)
