"""Comparison of two tokenizers by their ids."""

import msgspec
import numpy as np

from manifold_hc.data.tokenizer import Tokenizer

CHARACTERS = "".join(map(chr, (*range(1, 0x800), *range(0x4E00, 0x4E80), *range(0x1F600, 0x1F640))))
"""Two thousand characters of one to four bytes in UTF-8, without the byte 0."""

SENTENCE = (
    "The 3 quick brown foxes jump over 12,345 lazy dogs;\n\tdon't they?  Übergrößen, naïve café."
)


def have_same_ids(one: Tokenizer, other: Tokenizer) -> bool:
    """Return True if two tokenizers give texts the same ids.

    They do if their fingerprints are equal. Tokenizers with other fingerprints, such as a copy that
    another library has written again, are compared by their vocabularies and by the ids of a sample
    of characters and words.
    """
    if one.fingerprint == other.fingerprint:
        return True
    if one.source and other.source and _entries(one) != _entries(other):
        return False
    texts = [CHARACTERS, SENTENCE]
    pairs = zip(one.encode(texts), other.encode(texts), strict=True)
    return all(np.array_equal(mine, theirs) for mine, theirs in pairs)


def _entries(tokenizer: Tokenizer) -> object:
    """The vocabulary in a tokenizer.json, as its library writes it."""
    return msgspec.json.decode(tokenizer.source)["model"].get("vocab")
