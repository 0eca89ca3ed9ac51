"""Where a long document may be cut, so that its parts encode to the ids of the whole.

A model of the `tokenizers` library sees one word of the pre-tokenizer at a time, so a document may
be cut between two words, if words are found by what stands near them. That holds for the steps in
`LOCAL`. A cut is taken when the library itself confirms it: in a window around it, a word ends
there, and the two halves of the window give the ids of the window.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice

from manifold_hc.data.tokenizer_json import Definition

PART = 250_000
"""Characters of a part, about."""

MARGIN = 2_000
"""Characters on either side of a cut that are looked at."""

TRIES = 8
"""Places of either kind that are tried for one cut."""

LOCAL = {
    "pre_tokenizer": {
        "Sequence", "ByteLevel", "Split", "Whitespace", "WhitespaceSplit", "Metaspace",
        "BertPreTokenizer", "CharDelimiterSplit", "Punctuation", "Digits", "UnicodeScripts",
    },
    "normalizer": {
        "Sequence", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "Prepend",
        "Replace", "BertNormalizer", "Precompiled", "ByteLevel", "Nmt",
    },
}  # fmt: skip
"""Steps that look at the neighbourhood only; FixedLength, for one, counts from the beginning."""

ANCHORS = re.compile(rb"\\\\[AzZG]")
"""In a regular expression: the beginning or the end of the whole text, as JSON writes it."""

SPACES = re.compile(r"(?<=\w)\s(?=\w)")
EDGES = re.compile(r"(?<=\w)(?=[^\w])|(?<=[^\w\s])(?=\s)|(?<=\n)(?=\w)")
"""Changes of the kind of character: runs of digits, of spaces and of signs stay whole."""

Parted = Callable[[list[str]], list[list[tuple[int, int | None]]]]
"""The (id, number of its word) of the tokens of every text."""


def may_be_cut(definition: Definition) -> bool:
    """Whether all steps of the tokenizer are local."""
    return all(
        definition.uses(member) <= known
        and not ANCHORS.search(bytes(definition.members.get(member, b"")))
        for member, known in LOCAL.items()
    )


def parts(stretches: Iterable[str], encode: Parted) -> Iterator[str]:
    """The parts of a document that comes in stretches, each of about `PART` characters.

    One space between two parts is left out where the tokenizer puts a space before every part. A
    stretch without a place to cut makes its part longer.
    """
    held, wanted = "", PART
    for stretch in stretches:
        held += stretch
        while len(held) >= wanted + MARGIN:
            if (cut := _cut(held, wanted, encode)) is None:
                wanted += wanted  # twice as much, so that the time stays in proportion
                continue
            yield held[: cut[0]]
            held, wanted = held[cut[1] :], PART
    if held:
        yield held


def _cut(text: str, near: int, encode: Parted) -> tuple[int, int] | None:
    """(end of the part, start of the next) at or shortly behind `near`."""
    stop = len(text) - MARGIN
    places = (
        [match.start() for match in islice(kind.finditer(text, near, stop), TRIES)]
        for kind in (SPACES, EDGES)
    )
    for end in chain.from_iterable(places):
        before, behind = text[end - MARGIN : end], text[end : end + MARGIN]
        starts = (end, end + 1) if text[end].isspace() else (end,)
        for start in starts:
            whole, left, right = encode([before + behind, before, text[start : end + MARGIN]])
            ids = [token for token, _ in whole]
            if (
                0 < len(left) < len(whole)
                and whole[len(left) - 1][1] != whole[len(left)][1]
                and ids == [token for token, _ in left + right]
            ):
                return end, start
    return None
