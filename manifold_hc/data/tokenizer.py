"""Text to token ids: bytes, or any tokenizer.json."""

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from manifold_hc.data.boundary_token import Boundary, choose_boundary, unmarked
from manifold_hc.data.splitting import may_be_cut, parts
from manifold_hc.data.tokenizer_json import Definition
from manifold_hc.errors import ConfigError, DataError
from manifold_hc.files import read_regular

logger = logging.getLogger("manifold_hc")

LONG_PART = 4_000_000
"""Characters from which a part is worth a warning."""

BYTES_A_CHARACTER = 150
"""Memory that the library takes while it encodes a part."""


class Tokenizer(ABC):
    """What turns documents into ids."""

    name: str
    """For messages: bytes, or a path."""
    fingerprint: str
    """Equal for tokenizers that give equal ids: bytes, or the SHA-256 of the file."""
    vocabulary: int
    """Largest id + 1."""
    boundary: int | None
    """The id between documents; None where the tokenizer has no such token."""
    boundary_name: str
    """Its token, for people; empty for None."""
    source: bytes
    """The content of tokenizer.json; empty for bytes."""

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids [N] of every text, without special tokens.

        A text that spells a special token gives the ids of its characters.
        """

    def parts(self, document: Iterable[str]) -> Iterator[str]:
        """A document that comes in stretches, cut where its parts encode to the same ids."""
        return iter(document)

    @abstractmethod
    def announce(self) -> None:
        """Log what the name does not tell: the boundary, and how it was chosen."""


class ByteTokenizer(Tokenizer):
    """The bytes of UTF-8; the byte 0, which no text holds, is the boundary."""

    name = fingerprint = "bytes"
    vocabulary = 256
    boundary: int | None = 0
    boundary_name = "the byte 0"
    source = b""

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids [N] uint8 of every text."""
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    def announce(self) -> None:
        """Nothing: bytes have no choice."""


class FileTokenizer(Tokenizer):
    """A tokenizer.json, as Hugging Face's `tokenizers` writes it."""

    def __init__(self, file: Path, boundary: str | int | None = "") -> None:
        """boundary: a token or its id, "" for the tokenizer's end of text, None for no token.

        Raises DataError for a file that is no tokenizer, ConfigError for no such boundary.
        """
        try:
            self.source = read_regular(file)
        except (OSError, ValueError) as error:
            problem = getattr(error, "strerror", None) or error
            raise DataError(f"tokenizer: {file} cannot be read: {problem}") from None
        whole = _library(file, self.source)
        ids = whole.get_vocab(with_added_tokens=True)
        if not ids:
            raise DataError(f"tokenizer: {file} has no tokens; train it, or give another")
        self.name = str(file)
        self.fingerprint = hashlib.sha256(self.source).hexdigest()
        self.vocabulary = max(ids.values()) + 1
        try:
            self._definition = Definition.read(self.source)
            special = self._definition.special
            if isinstance(boundary, str):
                self._choice = choose_boundary(boundary, file, ids, special)
            else:
                token = "" if boundary is None else whole.id_to_token(boundary) or ""
                self._choice = Boundary(boundary, token, "as in the shards")
            self._ids = ids
            protected = {*special, self._choice.name} - {""}
            for_text = self._definition.for_text(protected)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise DataError(f"tokenizer: {file} is no tokenizer.json: {error}") from None
        self.boundary, self.boundary_name = self._choice.id, self._choice.name
        self._library = _library(file, for_text)
        self._library.encode_special_tokens = True
        self._may_be_cut = may_be_cut(self._definition)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids [N] uint32 of every text, on all cores; DataError for what has no id."""
        try:
            found = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # the library raises bare Exception
            raise self._refusal(error) from None
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in found]

    def parts(self, document: Iterable[str]) -> Iterator[str]:
        """Parts of about 250,000 characters; the whole where the tokenizer may join anything."""
        found = parts(document, self._words) if self._may_be_cut else iter(["".join(document)])
        for part in found:
            if len(part) > LONG_PART:
                logger.warning(
                    "%s: %.0f million characters have no place to cut; they take about %.1f GB",
                    self.name,
                    len(part) / 1e6,
                    len(part) * BYTES_A_CHARACTER / 1e9,
                )
            yield part

    def announce(self) -> None:
        """Log the boundary, and what the tokenizer does to texts that nobody would expect."""
        choice = self._choice
        if choice.id is not None:
            others = f"; data.boundary takes another: {', '.join(choice.others)}"
            logger.info(
                "%s: documents are separated by %s (id %d), %s%s",
                self.name,
                choice.name,
                choice.id,
                choice.reason,
                others if choice.others else "",
            )
        elif candidates := unmarked(self._ids):
            logger.warning(
                "%s: nothing separates documents, %s is not marked special; "
                "data.boundary takes it by name",
                self.name,
                candidates[0],
            )
        else:
            logger.info("%s: nothing separates documents, %s", self.name, choice.reason)
        if self._definition.dropout:
            logger.warning(
                "%s: dropout is switched off; the same text gives the same ids", self.name
            )
        if not self._definition.unknown:
            logger.warning(
                "%s: characters outside its vocabulary are lost; it has neither an unknown token "
                "nor bytes",
                self.name,
            )

    def _words(self, texts: list[str]) -> list[list[tuple[int, int | None]]]:
        """The (id, number of its word) of the tokens of every text."""
        try:
            found = self._library.encode_batch(texts, add_special_tokens=False)
        except Exception as error:  # the library raises bare Exception
            raise self._refusal(error) from None
        return [list(zip(e.ids, e.word_ids, strict=True)) for e in found]

    def _refusal(self, error: Exception) -> DataError:
        return DataError(
            f"tokenizer: {self.name} has no ids for a text ({error}); "
            "give a tokenizer with an unknown token or with bytes"
        )


def tokenizer(name: str, boundary: str | int | None = "") -> Tokenizer:
    """The tokenizer `name`: "bytes" or "", or the path of a tokenizer.json.

    boundary: as `FileTokenizer` takes it; bytes have their own.
    """
    if name not in ("", "bytes"):
        return FileTokenizer(user_path(name, "tokenizer"), boundary)
    if boundary:
        raise ConfigError("data.boundary: bytes have the byte 0 as boundary; leave it out")
    return ByteTokenizer()


def narrowest(vocabulary: int) -> np.dtype:
    """The smallest unsigned dtype that holds every id."""
    return np.min_scalar_type(vocabulary - 1)


def require_vocabulary(name: str, vocabulary: int, model: int) -> None:
    """Raise DataError if a tokenizer's `vocabulary` is larger than the model's."""
    if vocabulary > model:
        raise DataError(
            f"data: {name} has {vocabulary} ids but model.vocabulary is {model}; "
            f"give model.vocabulary={vocabulary} or more"
        )


def user_path(name: str, field: str) -> Path:
    """A path as a user writes it, `~` for the home folder; DataError for a user nobody knows."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise DataError(f"{field}: {name} is no path: {error}") from None


def _library(file: Path, source: bytes) -> Any:
    """The library's tokenizer, without truncation or padding."""
    try:
        from tokenizers import Tokenizer as Library
    except ImportError:
        raise DataError(
            f"tokenizer: {file} needs tokenizers; "
            "install it with: pip install 'manifold-hc[tokenizers]'"
        ) from None
    try:
        found = Library.from_str(source.decode())
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"tokenizer: {file} is no tokenizer.json: {error}") from None
    found.no_truncation()
    found.no_padding()
    return found
