"""Tokenizers: the bytes of UTF-8, or any tokenizer.json."""

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from manifold_hc.data import splitting
from manifold_hc.data.boundary_token import (
    BoundaryToken,
    choose_boundary_token,
    end_of_text_names,
)
from manifold_hc.data.tokenizer_json import TokenizerJson
from manifold_hc.errors import ConfigError, DataError
from manifold_hc.files import read_regular

logger = logging.getLogger("manifold_hc")

LONG_PIECE = 4_000_000
"""Characters above which a piece gets a warning."""

BYTES_PER_CHARACTER = 150
"""Memory that the library needs to tokenize one character."""


class Tokenizer(ABC):
    """Turns texts into token ids."""

    name: str
    """Name for messages: bytes, or a path."""
    fingerprint: str
    """Equal for equal tokenizers: bytes, or the SHA-256 of the file."""
    vocabulary: int
    """Largest id + 1."""
    boundary: int | None
    """Id of the boundary token between documents; None if the tokenizer has no such token."""
    boundary_name: str
    """Name of the boundary token for messages; empty if there is none."""
    source: bytes
    """Content of tokenizer.json; empty for bytes."""

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids [N] of every text, without special tokens.

        A text that contains the name of a special token gets the ids of its characters. Raises
        DataError for a single string in place of a list.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of ids; bytes that are not UTF-8 become U+FFFD."""

    def split(self, document: Iterable[str]) -> Iterator[str]:
        """Split a document that comes in chunks into pieces with the ids of the whole."""
        return iter(document)

    @abstractmethod
    def announce(self) -> None:
        """Log the boundary token and the rule that chose it."""


class ByteTokenizer(Tokenizer):
    """The bytes of UTF-8; the byte 0, which no text contains, is the boundary token."""

    name = fingerprint = "bytes"
    vocabulary = 256
    boundary: int | None = 0
    boundary_name = "the byte 0"
    source = b""

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids [N] uint8 of every text."""
        _require_list(texts)
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of ids; bytes that are not UTF-8 become U+FFFD.

        Raises DataError for an id above 255.
        """
        numbers = [int(number) for number in ids]
        if other := [number for number in numbers if not 0 <= number < self.vocabulary]:
            raise DataError(f"tokenizer: a byte is from 0 to 255 but an id is {other[0]}")
        return bytes(numbers).decode(errors="replace")

    def announce(self) -> None:
        """Log nothing: bytes have one boundary token."""


class FileTokenizer(Tokenizer):
    """A tokenizer.json of Hugging Face's `tokenizers`."""

    def __init__(self, file: Path, boundary: str | int | None = "") -> None:
        """Load a tokenizer.json.

        Args:
            file: the tokenizer.json.
            boundary: boundary token or its id, "" for the tokenizer's end of text, None for none.

        Raises:
            DataError: for a file that is not a tokenizer.json or has no tokens.
            ConfigError: for a boundary that is not one of its tokens.
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
            self._json = TokenizerJson.read(self.source)
            special = self._json.special
            if isinstance(boundary, str):
                self._boundary = choose_boundary_token(boundary, file, ids, special)
            else:
                token = "" if boundary is None else whole.id_to_token(boundary) or ""
                self._boundary = BoundaryToken(boundary, token, "as in the shards")
            self._ids = ids
            protected = {*special, self._boundary.name} - {""}
            for_text = self._json.for_text(protected)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise DataError(f"tokenizer: {file} is no tokenizer.json: {error}") from None
        self.boundary, self.boundary_name = self._boundary.id, self._boundary.name
        self._decoder = whole
        self._library = _library(file, for_text)
        self._library.encode_special_tokens = True
        self._can_split = splitting.can_split(self._json)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids [N] uint32 of every text, on all cores; DataError for text without ids."""
        _require_list(texts)
        try:
            encodings = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # the library raises bare Exception
            raise self._no_ids(error) from None
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of ids, special tokens by their names."""
        text: str = self._decoder.decode(list(ids), skip_special_tokens=False)
        return text

    def split(self, document: Iterable[str]) -> Iterator[str]:
        """Yield pieces of about 250,000 characters, or the whole if words are not local."""
        whole = not self._can_split
        pieces = ["".join(document)] if whole else splitting.split(document, self._encode_words)
        for piece in pieces:
            if len(piece) > LONG_PIECE:
                logger.warning(
                    "%s: %.0f million characters have no place to cut; they take about %.1f GB",
                    self.name,
                    len(piece) / 1e6,
                    len(piece) * BYTES_PER_CHARACTER / 1e9,
                )
            yield piece

    def announce(self) -> None:
        """Log the boundary token, and warn of dropout and of characters without ids."""
        choice = self._boundary
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
        elif candidates := end_of_text_names(self._ids):
            logger.warning(
                "%s: nothing separates documents, %s is not marked special; "
                "data.boundary takes it by name",
                self.name,
                candidates[0],
            )
        else:
            logger.info("%s: nothing separates documents, %s", self.name, choice.reason)
        if self._json.dropout:
            logger.warning(
                "%s: dropout is switched off; the same text gives the same ids", self.name
            )
        if not self._json.covers_unknown:
            logger.warning(
                "%s: characters outside its vocabulary are lost; it has neither an unknown token "
                "nor bytes",
                self.name,
            )

    def _encode_words(self, texts: list[str]) -> list[list[tuple[int, int | None]]]:
        """Return (token id, index of its word) of the tokens of every text."""
        try:
            encodings = self._library.encode_batch(texts, add_special_tokens=False)
        except Exception as error:  # the library raises bare Exception
            raise self._no_ids(error) from None
        return [list(zip(e.ids, e.word_ids, strict=True)) for e in encodings]

    def _no_ids(self, error: Exception) -> DataError:
        return DataError(
            f"tokenizer: {self.name} has no ids for a text ({error}); "
            "give a tokenizer with an unknown token or with bytes"
        )


def tokenizer(name: str, boundary: str | int | None = "") -> Tokenizer:
    """Return the tokenizer `name`: "bytes" or "", or the path of a tokenizer.json.

    boundary: see `FileTokenizer`; ConfigError if it is given for bytes.
    """
    if name not in ("", "bytes"):
        return FileTokenizer(user_path(name, "tokenizer"), boundary)
    if boundary:
        raise ConfigError("data.boundary: bytes have the byte 0 as boundary; leave it out")
    return ByteTokenizer()


def narrowest_dtype(vocabulary: int) -> np.dtype:
    """Return the smallest unsigned dtype that holds every id."""
    return np.min_scalar_type(vocabulary - 1)


def require_vocabulary(name: str, vocabulary: int, model: int) -> None:
    """Raise DataError if a tokenizer's `vocabulary` is larger than the model's."""
    if vocabulary > model:
        raise DataError(
            f"data: {name} has {vocabulary} ids but model.vocabulary is {model}; "
            f"give model.vocabulary={vocabulary} or more"
        )


def user_path(name: str, field: str) -> Path:
    """Expand `~` in a path that a user wrote; DataError for an unknown user."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise DataError(f"{field}: {name} is no path: {error}") from None


def _require_list(texts: Sequence[str]) -> None:
    """Raise DataError for one string, whose characters would be a text each."""
    if isinstance(texts, str):
        raise DataError("encode: takes a list of texts but got one string; give encode([text])")


def _library(file: Path, source: bytes) -> Any:
    """Load the library's tokenizer, without truncation or padding."""
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
