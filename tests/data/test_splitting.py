"""A long document, split into pieces before it is tokenized."""

import json
import random
import tempfile

import numpy as np
import pytest
import tokenizers

from manifold_hc.data import splitting
from manifold_hc.data.encoding import concatenate, encode
from manifold_hc.data.tokenizer import tokenizer
from manifold_hc.data.tokens import ArraySegment
from manifold_hc.errors import DataError
from tests.data import small_tokenizers as small

PIECE, MARGIN = 1500, 200
KINDS = {
    "words by a pattern": small.byte_level,
    "digits from the right": lambda: small.byte_level(small.DIGITS_FROM_THE_RIGHT),
    "SentencePiece BPE": small.sentencepiece_bpe,
    "Unigram": small.unigram,
    "Unigram, a space before the first word": lambda: small.unigram("first"),
    "WordPiece": small.wordpiece,
    "WordLevel": small.wordlevel,
}
UNSPLIT = {
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
def short_pieces(monkeypatch):
    monkeypatch.setattr(splitting, "PIECE", PIECE)
    monkeypatch.setattr(splitting, "MARGIN", MARGIN)


def saved_and_loaded(trained, folder):
    trained.save(str(folder / "tokenizer.json"))
    return tokenizer(str(folder / "tokenizer.json"))


def chunks(text):
    """Chunks of a text, as a file reader gives them."""
    return [text[i : i + 777] for i in range(0, len(text), 777)]


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_have_the_ids_of_the_whole(tmp_path, kind):
    found = saved_and_loaded(KINDS[kind](), tmp_path)
    for name, text in TEXTS.items():
        pieces = list(found.split(chunks(text)))
        assert np.array_equal(np.concatenate(found.encode(pieces)), found.encode([text])[0]), name
        if name in ("prose", "hostile"):
            assert max(map(len, pieces)) < 3 * PIECE, f"{name}: memory stays bounded"


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("kind", UNSPLIT)
def test_a_document_is_not_split_if_words_are_not_local(tmp_path, kind):
    found = saved_and_loaded(UNSPLIT[kind](), tmp_path)
    assert list(found.split(chunks(TEXTS["prose"]))) == [TEXTS["prose"]]


@pytest.mark.usefixtures("short_pieces")
def test_a_document_is_split_despite_a_special_token_with_a_space(tmp_path):
    trained = small.sentencepiece_bpe()
    content = json.loads(trained.to_str())
    vocabulary = content["model"]["vocab"]
    content["added_tokens"] = content["added_tokens"][:1]
    vocabulary["<end▁of▁text>"] = vocabulary.pop("</s>")
    special = {"id": vocabulary["<end▁of▁text>"], "content": "<end▁of▁text>", "special": True}
    content["added_tokens"].append(content["added_tokens"][0] | special)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    found = tokenizer(str(tmp_path / "tokenizer.json"))
    assert max(map(len, found.split(chunks(TEXTS["prose"])))) < 3 * PIECE


@pytest.mark.usefixtures("short_pieces")
def test_a_document_is_not_split_if_a_pattern_has_an_anchor(tmp_path):
    found = saved_and_loaded(small.byte_level(r"\s+\z|\s|\S+"), tmp_path)
    assert list(found.split(chunks(TEXTS["prose"]))) == [TEXTS["prose"]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_has_the_ids_of_the_library(tmp_path, kind):
    """The modified tokenizer.json changes the ids of special tokens only."""
    found = saved_and_loaded(KINDS[kind](), tmp_path)
    library = tokenizers.Tokenizer.from_file(found.name)
    for name, text in TEXTS.items():
        plain = text.replace("</s>", "")
        wanted = library.encode(plain, add_special_tokens=False).ids
        assert found.encode([plain])[0].tolist() == wanted, name


@pytest.mark.usefixtures("short_pieces")
def test_chunks_of_documents_are_concatenated_with_boundary_tokens(tmp_path):
    found = saved_and_loaded(small.byte_level(), tmp_path)
    texts = [TEXTS["prose"], "", TEXTS["hostile"], "the end"]
    segment = concatenate(encode(map(chunks, texts), found))
    whole = [ids for ids in found.encode(texts) if len(ids)]
    wanted = np.concatenate([whole[0], [found.boundary], whole[1], [found.boundary], whole[2]])
    assert segment.ids.tolist() == wanted.tolist()
    assert segment.starts.tolist() == [0, len(whole[0]), len(whole[0]) + 1 + len(whole[1])]
    assert segment.ids.dtype == np.uint16
    assert segment.digest == ArraySegment(segment.ids, segment.starts).digest


@pytest.mark.usefixtures("short_pieces")
def test_many_ids_are_mapped_from_a_file(tmp_path, monkeypatch):
    found = saved_and_loaded(small.byte_level(), tmp_path)

    def concatenated():
        return concatenate(encode(map(chunks, [TEXTS["prose"], TEXTS["hostile"]]), found))

    in_memory = concatenated()
    monkeypatch.setattr("manifold_hc.data.encoding.MEMORY_BYTES", 1000)
    mapped = concatenated()
    assert isinstance(mapped.ids, np.memmap)
    assert not isinstance(in_memory.ids, np.memmap)
    assert mapped.ids.tolist() == in_memory.ids.tolist()
    assert mapped.starts.tolist() == in_memory.starts.tolist()
    assert (mapped.ids.dtype, mapped.digest) == (in_memory.ids.dtype, in_memory.digest)


def test_a_full_temporary_folder_is_named_in_the_error(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    monkeypatch.setattr("manifold_hc.data.encoding.MEMORY_BYTES", 1000)
    ids = np.zeros(600, dtype=np.uint8)
    with pytest.raises(DataError, match=r"do not fit in /\S+/gone: No such .*; set TMPDIR"):
        concatenate([(True, ids), (False, ids)])


def test_a_long_piece_logs_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("manifold_hc.data.tokenizer.LONG_PIECE", 1000)
    list(saved_and_loaded(small.counted(), tmp_path).split(["the end"] * 1000))
    assert "0 million characters have no place to cut; they take about 0.0 GB" in caplog.text
