"""Copy of a run's tokenizer in its folder, so that the run can be used without its data.

tokenizer.json         the tokenizer; none for bytes
tokenizer_config.json  its token between documents, under transformers' name `eos_token`
"""

import logging
from pathlib import Path

import msgspec

from manifold_hc.data.boundary_token import CONFIG
from manifold_hc.data.config import DataConfig
from manifold_hc.data.loading import tokenizer_of
from manifold_hc.data.shards import TOKENIZER
from manifold_hc.data.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer, user_path
from manifold_hc.errors import DataError
from manifold_hc.files import write_atomically

logger = logging.getLogger("manifold_hc")


def save_tokenizer(folder: Path, config: DataConfig) -> None:
    """Copy the tokenizer of a run into its folder; a folder that cannot be written is logged."""
    tokenizer = tokenizer_of(config)
    if not tokenizer.source:
        return
    try:
        write_atomically(folder / TOKENIZER, tokenizer.source)
        if tokenizer.boundary is not None:
            named = msgspec.json.encode({"eos_token": tokenizer.boundary_name})
            write_atomically(folder / CONFIG, msgspec.json.format(named))
    except OSError as error:
        logger.warning("run folder: %s cannot be written: %s", error.filename, error.strerror)


def run_tokenizer(folder: Path, config: DataConfig, vocabulary: int) -> Tokenizer:
    """Return the tokenizer of a run: its copy, or the one that its configuration names.

    vocabulary: size of the model's. A run without a copy whose data are gone trained on bytes if it
    has 256 ids, and is a DataError otherwise.
    """
    if (folder / TOKENIZER).exists():
        return FileTokenizer(folder / TOKENIZER, config.boundary)
    gone = [path for path in config.paths if not user_path(path, "data").exists()]
    if gone and not config.tokenizer and vocabulary != ByteTokenizer.vocabulary:
        raise DataError(
            f"load: {folder} has no {TOKENIZER}, and its data {gone[0]} are gone; name the "
            "tokenizer as data.tokenizer in its config.json, a file or bytes"
        )
    return tokenizer_of(config)
