"""A long document, encoded in parts."""

import json
import random
import tempfile

import numpy as np
import pytest
import tokenizers

from manifold_hc.data import splitting
from manifold_hc.data.encoding import encode, joined
from manifold_hc.data.tokenizer import tokenizer
from manifold_hc.data.tokens import ArrayPart
from manifold_hc.errors import DataError
from tests.data import small_tokenizers as small

PART, MARGIN = 1500, 200
KINDS = {
    "words by a pattern": small.byte_level,
    "digits from the right": lambda: small.byte_level(small.DIGITS_FROM_THE_RIGHT),
    "SentencePiece BPE": small.sentencepiece_bpe,
    "Unigram": small.unigram,
    "Unigram, a space before the first word": lambda: small.unigram("first"),
    "WordPiece": small.wordpiece,
    "WordLevel": small.wordlevel,
}
UNCUT = {
    "words of five characters": small.counted,
    "tokens across words": lambda: small.sentencepiece_bpe(joins_words=True),
}


def hostile_text(length):
    """Words between runs of digits, spaces, line ends, signs, marks and other scripts."""
    draw = random.Random(0)
    pools = [
        "0123456789",
        "   \n\t",
        " \n",
        "漢字、。",
        "éß",
        "😀👍🏽",
        ".,:<>()",
        "y\u0308 ",
        "de ",
    ]
    text = ""
    while len(text) < length:
        pool = draw.choice(pools)
        text += "".join(draw.choices(pool, k=draw.choice([1, 3, 20, 90])))
        text += draw.choice([" ", " the end", "</s>", " <table> ", "\n"])
    return text


TEXTS = {
    "prose": " ".join(
        random.Random(1).choices(["the", "end", "of", "text,", "words\nline", "12"], k=4000)
    ),
    "hostile": hostile_text(15_000),
    "one run of digits": "a" + "7" * 9_000 + " of the text" * 300,
    "spaces": "the" + " " * 5_000 + "end " * 2_000,
    "one word": "abc" * 4_000,
}


@pytest.fixture
def short_parts(monkeypatch):
    monkeypatch.setattr(splitting, "PART", PART)
    monkeypatch.setattr(splitting, "MARGIN", MARGIN)


def opened(trained, folder):
    trained.save(str(folder / "tokenizer.json"))
    return tokenizer(str(folder / "tokenizer.json"))


def stretches(text):
    """What a file gives: pieces that end anywhere."""
    return [text[i : i + 777] for i in range(0, len(text), 777)]


@pytest.mark.usefixtures("short_parts")
@pytest.mark.parametrize("kind", KINDS)
def test_parts_have_the_ids_of_the_whole(tmp_path, kind):
    found = opened(KINDS[kind](), tmp_path)
    for name, text in TEXTS.items():
        parts = list(found.parts(stretches(text)))
        assert np.array_equal(np.concatenate(found.encode(parts)), found.encode([text])[0]), name
        if name in ("prose", "hostile"):
            assert max(map(len, parts)) < 3 * PART, f"{name}: memory stays bounded"


@pytest.mark.usefixtures("short_parts")
@pytest.mark.parametrize("kind", UNCUT)
def test_where_words_are_not_local_the_whole_is_encoded(tmp_path, kind):
    found = opened(UNCUT[kind](), tmp_path)
    assert list(found.parts(stretches(TEXTS["prose"]))) == [TEXTS["prose"]]


@pytest.mark.usefixtures("short_parts")
def test_a_special_token_across_words_forbids_no_cuts(tmp_path):
    trained = small.sentencepiece_bpe()
    content = json.loads(trained.to_str())
    vocabulary = content["model"]["vocab"]
    content["added_tokens"] = content["added_tokens"][:1]
    vocabulary["<end▁of▁text>"] = vocabulary.pop("</s>")
    special = {"id": vocabulary["<end▁of▁text>"], "content": "<end▁of▁text>", "special": True}
    content["added_tokens"].append(content["added_tokens"][0] | special)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    found = tokenizer(str(tmp_path / "tokenizer.json"))
    assert max(map(len, found.parts(stretches(TEXTS["prose"])))) < 3 * PART


@pytest.mark.usefixtures("short_parts")
def test_an_anchor_in_a_pattern_forbids_cuts(tmp_path):
    found = opened(small.byte_level(r"\s+\z|\s|\S+"), tmp_path)
    assert list(found.parts(stretches(TEXTS["prose"]))) == [TEXTS["prose"]]


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_has_the_ids_that_the_library_gives(tmp_path, kind):
    """The copy of the tokenizer that encodes texts changes nothing but special tokens."""
    found = opened(KINDS[kind](), tmp_path)
    library = tokenizers.Tokenizer.from_file(found.name)
    for name, text in TEXTS.items():
        plain = text.replace("</s>", "")
        wanted = library.encode(plain, add_special_tokens=False).ids
        assert found.encode([plain])[0].tolist() == wanted, name


@pytest.mark.usefixtures("short_parts")
def test_documents_in_stretches_are_the_documents(tmp_path):
    found = opened(small.byte_level(), tmp_path)
    texts = [TEXTS["prose"], "", TEXTS["hostile"], "the end"]
    line = joined(encode(map(stretches, texts), found))
    whole = [ids for ids in found.encode(texts) if len(ids)]
    wanted = np.concatenate([whole[0], [found.boundary], whole[1], [found.boundary], whole[2]])
    assert line.ids.tolist() == wanted.tolist()
    assert line.starts.tolist() == [0, len(whole[0]), len(whole[0]) + 1 + len(whole[1])]
    assert line.ids.dtype == np.uint16
    assert line.digest == ArrayPart(line.ids, line.starts).digest


@pytest.mark.usefixtures("short_parts")
def test_many_ids_are_mapped_from_a_file(tmp_path, monkeypatch):
    found = opened(small.byte_level(), tmp_path)

    def line():
        return joined(encode(map(stretches, [TEXTS["prose"], TEXTS["hostile"]]), found))

    held = line()
    monkeypatch.setattr("manifold_hc.data.encoding.HELD", 1000)
    mapped = line()
    assert isinstance(mapped.ids, np.memmap)
    assert not isinstance(held.ids, np.memmap)
    assert mapped.ids.tolist() == held.ids.tolist()
    assert mapped.starts.tolist() == held.starts.tolist()
    assert (mapped.ids.dtype, mapped.digest) == (held.ids.dtype, held.digest)


def test_ids_that_do_not_fit_name_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    monkeypatch.setattr("manifold_hc.data.encoding.HELD", 1000)
    ids = np.zeros(600, dtype=np.uint8)
    with pytest.raises(DataError, match=r"do not fit in /\S+/gone: No such .*; set TMPDIR"):
        joined([(True, ids), (False, ids)])


def test_a_part_without_a_place_to_cut_is_announced(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("manifold_hc.data.tokenizer.LONG_PART", 1000)
    list(opened(small.counted(), tmp_path).parts(["the end"] * 1000))
    assert "0 million characters have no place to cut; they take about 0.0 GB" in caplog.text
