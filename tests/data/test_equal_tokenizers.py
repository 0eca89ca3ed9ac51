"""Tokenizers that are compared by their ids."""

import json
import shutil

from manifold_hc.data.equal_tokenizers import have_same_ids
from manifold_hc.data.tokenizer import ByteTokenizer, FileTokenizer


def rewritten(file, change=lambda content: None):
    """Write the tokenizer.json again with other white space, and changed."""
    content = json.loads(file.read_text())
    change(content)
    new = file.with_name(f"{change.__name__}.json".strip("<>"))
    new.write_text(json.dumps(content, indent=1))
    return FileTokenizer(new)


def test_another_spelling_of_a_file_is_the_same_tokenizer(bpe):
    file = bpe(300)
    original, copy = FileTokenizer(file), rewritten(file)
    assert original.fingerprint != copy.fingerprint
    assert have_same_ids(original, copy)


def test_other_merges_words_and_rules_are_another_tokenizer(bpe):
    file = bpe(300)
    original = FileTokenizer(file)

    def swapped(content):
        vocabulary = content["model"]["vocab"]
        a, b = list(vocabulary)[-2:]
        vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]

    def with_fewer_merges(content):
        del content["model"]["merges"][:10]

    def lowercase(content):
        content["normalizer"] = {"type": "Lowercase"}

    for change in (swapped, with_fewer_merges, lowercase):
        assert not have_same_ids(original, rewritten(file, change)), change.__name__
    assert not have_same_ids(original, FileTokenizer(shutil.move(bpe(290), file.parent / "b.json")))


def test_bytes_and_a_file_that_gives_bytes(bpe, tmp_path):
    file = bpe(300)
    assert have_same_ids(ByteTokenizer(), ByteTokenizer())
    assert not have_same_ids(ByteTokenizer(), FileTokenizer(file))
    characters = _byte_characters()
    content = json.loads(file.read_text())
    content["model"] |= {"vocab": {c: i for i, c in enumerate(characters)}, "merges": []}
    content["added_tokens"] = []
    plain = tmp_path / "bytes.json"
    plain.write_text(json.dumps(content))
    assert have_same_ids(ByteTokenizer(), FileTokenizer(plain))
    assert have_same_ids(FileTokenizer(plain), ByteTokenizer())


def _byte_characters():
    """Characters that stand for the bytes in a byte-level vocabulary, in the order of the bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = iter(range(256, 512))
    return [chr(byte if byte in printable else next(other)) for byte in range(256)]
