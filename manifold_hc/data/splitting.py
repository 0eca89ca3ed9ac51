"""Split of a long document into pieces that tokenize to the ids of the whole document.

A model of the `tokenizers` library sees one word of the pre-tokenizer at a time, so a document can
be split between two words, provided that the characters near a word determine it. That holds for
the steps in `LOCAL_STEPS`. The library itself confirms every split point: in a window around it, a
word ends there, and the two halves of the window give the ids of the window.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice

from manifold_hc.data.tokenizer_json import TokenizerJson

PIECE = 250_000
"""Characters of a piece, approximately."""

MARGIN = 2_000
"""Characters of the window on either side of a split point."""

CANDIDATES = 8
"""Candidates of either kind that are tried for one split point."""

LOCAL_STEPS = {
    "pre_tokenizer": {
        "Sequence", "ByteLevel", "Split", "Whitespace", "WhitespaceSplit", "Metaspace",
        "BertPreTokenizer", "CharDelimiterSplit", "Punctuation", "Digits", "UnicodeScripts",
    },
    "normalizer": {
        "Sequence", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "Prepend",
        "Replace", "BertNormalizer", "Precompiled", "ByteLevel", "Nmt",
    },
}  # fmt: skip
"""Steps that depend on nearby characters only. FixedLength, for one, counts from the start."""

ANCHORS = re.compile(rb"\\\\[AzZG]")
"""Anchors in a regular expression to the start or end of the text, as JSON escapes them."""

SPACES = re.compile(r"(?<=\w)\s(?=\w)")
EDGES = re.compile(r"(?<=\w)(?=[^\w])|(?<=[^\w\s])(?=\s)|(?<=\n)(?=\w)")
"""Changes of character class: runs of digits, of spaces and of punctuation stay whole."""

EncodeWords = Callable[[list[str]], list[list[tuple[int, int | None]]]]
"""Returns (token id, index of its word) of the tokens of every text."""


def can_split(tokenizer: TokenizerJson) -> bool:
    """Return True if all steps of the tokenizer are local."""
    return all(
        tokenizer.step_types(member) <= local
        and not ANCHORS.search(bytes(tokenizer.members.get(member, b"")))
        for member, local in LOCAL_STEPS.items()
    )


def split(chunks: Iterable[str], encode: EncodeWords) -> Iterator[str]:
    """Yield the pieces of a document that comes in chunks, each of about `PIECE` characters.

    One space between two pieces is left out if the tokenizer puts a space before every text. A
    piece grows until it has a split point.
    """
    held, wanted = "", PIECE
    for chunk in chunks:
        held += chunk
        while len(held) >= wanted + MARGIN:
            if (found := _split_point(held, wanted, encode)) is None:
                wanted += wanted  # doubled, so that the total time stays linear
                continue
            end, start = found
            yield held[:end]
            held, wanted = held[start:], PIECE
    if held:
        yield held


def _split_point(text: str, near: int, encode: EncodeWords) -> tuple[int, int] | None:
    """Return (end of a piece, start of the next) at or shortly after index `near`."""
    stop = len(text) - MARGIN
    candidates = (
        [match.start() for match in islice(kind.finditer(text, near, stop), CANDIDATES)]
        for kind in (SPACES, EDGES)
    )
    for end in chain.from_iterable(candidates):
        before, after = text[end - MARGIN : end], text[end : end + MARGIN]
        starts = (end, end + 1) if text[end].isspace() else (end,)
        for start in starts:
            whole, left, right = encode([before + after, before, text[start : end + MARGIN]])
            ids = [token for token, _ in whole]
            if (
                0 < len(left) < len(whole)
                and whole[len(left) - 1][1] != whole[len(left)][1]
                and ids == [token for token, _ in left + right]
            ):
                return end, start
    return None
