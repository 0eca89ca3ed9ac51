import json
import os

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models
from tokenizers.processors import TemplateProcessing

from manifold_hc.data.boundary_token import end_of_text_names
from manifold_hc.data.tokenizer import narrowest_dtype, tokenizer
from manifold_hc.errors import ConfigError, DataError
from tests.data import small_tokenizers as small


def test_bytes():
    found = tokenizer("bytes")
    assert [ids.tolist() for ids in found.encode(["Straße", ""])] == [list("Straße".encode()), []]
    assert (found.vocabulary, found.boundary, found.fingerprint) == (256, 0, "bytes")
    with pytest.raises(ConfigError, match="bytes have the byte 0"):
        tokenizer("bytes", boundary="<eos>")


def test_one_string_is_no_list_of_texts(bpe):
    for found in (tokenizer("bytes"), tokenizer(str(bpe()))):
        with pytest.raises(DataError, match=r"encode: takes a list .* give encode\(\[text\]\)"):
            found.encode("abc")


def test_a_tokenizer_file_gives_the_ids_of_the_library(bpe):
    file = bpe()
    found, library = tokenizer(str(file)), Tokenizer.from_file(str(file))
    texts = ["tea and toast", "Straße"]
    assert [i.tolist() for i in found.encode(texts)] == [library.encode(t).ids for t in texts]
    assert library.decode(found.encode(texts)[0].tolist()) == texts[0]
    assert found.vocabulary == library.get_vocab_size() == 300
    assert found.boundary == library.token_to_id("<|endoftext|>")
    assert (
        found.fingerprint
        == tokenizer(str(file)).fingerprint
        != tokenizer(str(bpe(301))).fingerprint
    )


def test_truncation_padding_and_post_processor_are_ignored(bpe, tmp_path):
    library = Tokenizer.from_file(str(bpe()))
    library.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    library.enable_truncation(3)
    library.enable_padding(length=50)
    library.save(str(tmp_path / "tokenizer.json"))
    text = "a text with more than three tokens"
    wanted = tokenizer(str(bpe())).encode([text])[0]
    assert np.array_equal(tokenizer(str(tmp_path / "tokenizer.json")).encode([text])[0], wanted)
    assert len(wanted) > 3


def test_boundaries(bpe):
    file = bpe(special=("<pad>", "<stop>"))
    assert tokenizer(str(file)).boundary is None
    assert tokenizer(str(file), "<stop>").boundary == 1
    with pytest.raises(ConfigError, match="has no token '<end>'"):
        tokenizer(str(file), "<end>")


def test_a_file_that_is_not_a_tokenizer_is_an_error(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        tokenizer(str(tmp_path / "nowhere.json"))
    (tmp_path / "other.json").write_text(json.dumps({"model": 3}))
    with pytest.raises(DataError, match=r"other\.json is no tokenizer\.json"):
        tokenizer(str(tmp_path / "other.json"))


def test_narrowest_dtype():
    assert [narrowest_dtype(v) for v in (256, 257, 65536, 65537)] == [
        "uint8",
        "uint16",
        "uint16",
        "uint32",
    ]


MODELS = {
    "BPE of bytes": small.byte_level,
    "BPE of characters": small.sentencepiece_bpe,
    "Unigram": small.unigram,
    "WordPiece": small.wordpiece,
    "WordLevel": small.wordlevel,
}


def saved(library, folder):
    library.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


@pytest.mark.parametrize("kind", MODELS)
def test_the_name_of_a_special_token_in_a_text_is_text(tmp_path, kind):
    """`encode_special_tokens` does not cover the vocabulary of a model: Unigram has `</s>`."""
    library = MODELS[kind]()
    special = [library.token_to_id(name) for name in ("</s>", "<|endoftext|>", "<|extra|>")]
    found = tokenizer(saved(library, tmp_path))
    text = "the end <|endoftext|> of </s> the <|extra|> text"
    ids = found.encode([text])[0].tolist()
    assert not set(ids) & set(special)
    assert found.boundary == special[1]
    words = ["the", "end", "of", "the", "text"]
    plain = found.encode([" ".join(words)])[0].tolist()
    assert set(plain) <= set(ids), "the words around it are there"
    if kind == "BPE of bytes":
        assert library.decode(ids).split() == text.split(), "generated ids decode to the text"


def test_added_tokens_that_are_not_special_stay_tokens(tmp_path):
    library = small.byte_level()
    ids = tokenizer(saved(library, tmp_path)).encode(["the <table> end"])[0].tolist()
    assert library.token_to_id("<table>") in ids


def test_a_boundary_token_that_is_not_special_is_text_in_a_text(tmp_path):
    """A document that contains the name of the boundary token must not end there."""
    library = small.byte_level()
    found = tokenizer(saved(library, tmp_path), "<table>")
    assert found.boundary == library.token_to_id("<table>")
    assert found.boundary not in found.encode(["the <table> end"])[0].tolist()


def test_a_special_token_that_merges_produce(tmp_path):
    letters = {"<": 0, "e": 1, ">": 2, "<e": 3, "<e>": 4, "a": 5}
    library = Tokenizer(models.BPE(letters, [("<", "e"), ("<e", ">")]))
    library.add_special_tokens(["<e>"])
    assert tokenizer(saved(library, tmp_path)).encode(["a<e>a"])[0].tolist() == [5, 3, 2, 5]


def test_a_special_token_that_merges_use(tmp_path):
    letters = {"<": 0, "e": 1, ">": 2, "<e": 3, "<e>": 4, "a": 5, "<e>a": 6}
    library = Tokenizer(models.BPE(letters, [("<", "e"), ("<e", ">"), ("<e>", "a")]))
    library.add_special_tokens(["<e>"])
    assert tokenizer(saved(library, tmp_path)).encode(["a<e>a"])[0].tolist() == [5, 3, 2, 5]


def test_a_special_token_that_merges_with_a_prefix_produce(tmp_path):
    letters = {"<": 0, "##e": 1, "##>": 2, "<e": 3, "<e>": 4}
    merges = [("<", "##e"), ("<e", "##>")]
    library = Tokenizer(models.BPE(letters, merges, continuing_subword_prefix="##"))
    library.add_special_tokens(["<e>"])
    assert tokenizer(saved(library, tmp_path)).encode(["<e>"])[0].tolist() == [3, 2]


ONE_WORD = {
    "whole words of the vocabulary": models.BPE(
        {"▁": 0, "a": 1, "▁a": 2}, [("▁", "a")], ignore_merges=True
    ),
    "a whole word without merges": models.BPE({"▁": 0, "a": 1, "▁a": 2}, [], ignore_merges=True),
    "ends of words": models.BPE({"▁": 0, "a": 1, "a.": 2}, [], end_of_word_suffix="."),
    "beginnings of words": models.BPE(
        {"▁": 0, "#▁": 1, "#a": 2}, [], continuing_subword_prefix="#"
    ),
    "unknown signs in one": models.BPE({"?": 0, "a": 1}, [], unk_token="?", fuse_unk=True),
    "words by a list": models.WordLevel({"▁": 0, "▁a": 1, "?": 2}, unk_token="?"),
    "words by pieces": models.WordPiece({"▁": 0, "##▁": 1, "##a": 2, "?": 3}, unk_token="?"),
}


@pytest.mark.parametrize("name", ONE_WORD)
def test_a_text_without_words_is_one_word(tmp_path, name):
    """A text that the model sees as one word is not split."""
    library = Tokenizer(ONE_WORD[name])
    wanted = [library.encode(text).ids for text in ("▁a▁a", "b▁a▁b")]
    found = tokenizer(saved(library, tmp_path)).encode(["▁a▁a", "b▁a▁b"])
    assert [ids.tolist() for ids in found] == wanted


def test_a_special_token_of_one_character_is_that_character(tmp_path):
    library = Tokenizer(models.BPE({"a": 0, "\n": 1}, []))
    library.add_special_tokens(["\n"])
    assert tokenizer(saved(library, tmp_path)).encode(["a\na"])[0].tolist() == [0, 1, 0]


def test_dropout_is_switched_off_with_a_warning(tmp_path, caplog):
    library = small.byte_level()
    wanted = library.encode("the end of the text" * 50).ids
    library.model.dropout = 0.5
    found = tokenizer(saved(library, tmp_path))
    assert all(found.encode(["the end of the text" * 50])[0].tolist() == wanted for _ in range(3))
    found.announce()
    assert "dropout is switched off" in caplog.text


def test_scores_keep_all_digits(tmp_path):
    """A number of more than 17 digits is copied unchanged."""
    content = json.loads(small.unigram().to_str())
    content["model"]["vocab"] = [["<unk>", 0.0], ["▁", -3.1234567890123457], ["a", -2.5]]
    content["added_tokens"] = content["added_tokens"][:1]
    source = json.dumps(content).replace("-3.1234567890123457", "-3.12345678901234567890")
    (tmp_path / "tokenizer.json").write_text(source)
    found = tokenizer(str(tmp_path / "tokenizer.json"))
    assert b"-3.12345678901234567890" in found._json.for_text({"<unk>"})


@pytest.mark.parametrize(
    ("library", "message"),
    [
        (Tokenizer(models.BPE()), "has no tokens"),
        (Tokenizer(models.WordLevel()), "has no tokens"),
    ],
)
def test_a_tokenizer_without_tokens(tmp_path, library, message):
    with pytest.raises(DataError, match=message):
        tokenizer(saved(library, tmp_path))


@pytest.mark.parametrize(
    "model",
    [
        models.Unigram([("a", -1.0)]),
        models.WordLevel({"a": 0}, unk_token="[UNK]"),
        models.WordPiece({"a": 0}, unk_token="[UNK]"),
    ],
)
def test_a_tokenizer_without_unknown_token(tmp_path, model):
    found = tokenizer(saved(Tokenizer(model), tmp_path))
    with pytest.raises(DataError, match=r"has no ids for a text .*give a tokenizer with"):
        found.encode(["b"])


def test_characters_without_ids_log_a_warning(tmp_path, caplog):
    tokenizer(saved(Tokenizer(models.BPE({"a": 0}, [])), tmp_path)).announce()
    assert "characters outside its vocabulary are lost" in caplog.text
    caplog.clear()
    tokenizer(saved(small.byte_level(), tmp_path)).announce()
    assert "are lost" not in caplog.text


BOUNDARIES = {
    "an HTML tag is no end": (["<eos>"], ["</s>"], None, "<eos>"),
    "other spellings": (["<pad>", "[EOS]"], [], None, "[EOS]"),
    "other spellings too": (["<pad>", "<EOS_TOKEN>"], [], None, "<EOS_TOKEN>"),
    "DeepSeek's": (["<｜end▁of▁sentence｜>", "<pad>"], [], None, "<｜end▁of▁sentence｜>"),
    "the end of a turn loses": (["<|im_end|>", "<|endoftext|>"], [], None, "<|endoftext|>"),
    "the end of a turn loses to any": (["<|im_end|>", "</s>"], [], None, "</s>"),
    "the end of a turn alone": (["<|im_end|>"], [], None, "<|im_end|>"),
    "the configuration decides": (["<eos>", "<stop>"], [], "<stop>", "<stop>"),
    "it names an unmarked token": (["<eos>"], ["<stop>"], "<stop>", "<stop>"),
    "older configurations": (["<eos>", "<stop>"], [], {"content": "<stop>"}, "<stop>"),
    "a chat model's configuration": (["<eos>", "<|im_end|>"], [], "<|im_end|>", "<eos>"),
    "it names no token": (["<eos>"], [], "<gone>", "<eos>"),
    "nothing is marked": ([], ["<eos>"], None, None),
}


@pytest.mark.parametrize("case", BOUNDARIES)
def test_the_end_of_text(tmp_path, caplog, case):
    special, ordinary, configured, wanted = BOUNDARIES[case]
    library = Tokenizer(models.BPE({"a": 0}, []))
    library.add_tokens([AddedToken(name, special=False) for name in ordinary])
    library.add_special_tokens(special)
    if configured:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": configured}))
    found = tokenizer(saved(library, tmp_path))
    assert found.boundary == (None if wanted is None else library.token_to_id(wanted))
    assert found.boundary_name == (wanted or "")
    with caplog.at_level("INFO", "manifold_hc"):
        found.announce()
    assert (wanted or "nothing separates documents, <eos> is not marked") in caplog.text


@pytest.mark.parametrize("content", [b"[1]", b"{", b"\xff", b"[" * 100_000, b'{"eos_token": 3}'])
def test_an_invalid_configuration_is_ignored(tmp_path, content):
    library = Tokenizer(models.BPE({"a": 0}, []))
    library.add_special_tokens(["<eos>"])
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    assert tokenizer(saved(library, tmp_path)).boundary_name == "<eos>"


def test_end_of_text_names_are_sorted_by_priority():
    names = ["<eos>", "eos", "[endoftext]", "sep", "<pad>"]
    assert end_of_text_names(dict.fromkeys(names, 0)) == ["[endoftext]", "<eos>"]


def test_only_regular_files_are_read(tmp_path):
    """Opening a FIFO would block until it has a writer."""
    library = Tokenizer(models.BPE({"a": 0}, []))
    library.add_special_tokens(["<eos>"])
    os.mkfifo(tmp_path / "tokenizer_config.json")
    assert tokenizer(saved(library, tmp_path)).boundary_name == "<eos>"
    with pytest.raises(DataError, match="cannot be read: is not a regular file"):
        tokenizer(str(tmp_path / "tokenizer_config.json"))


@pytest.mark.parametrize(
    ("special", "others"),
    [(["<eos>", "[EOS]"], "[EOS]"), (["<|endoftext|>", "<|im_end|>"], "")],
)
def test_end_of_turn_tokens_are_not_listed_as_alternatives(tmp_path, caplog, special, others):
    library = Tokenizer(models.BPE({"a": 0}, []))
    library.add_special_tokens(special)
    with caplog.at_level("INFO", "manifold_hc"):
        tokenizer(saved(library, tmp_path)).announce()
    assert ("data.boundary takes another" in caplog.text) == bool(others)
    assert others in caplog.text


def test_the_log_lists_other_end_of_text_tokens(tmp_path, caplog):
    library = Tokenizer(models.BPE({"a": 0}, []))
    library.add_special_tokens(["</s>", "<eos>"])
    with caplog.at_level("INFO", "manifold_hc"):
        tokenizer(saved(library, tmp_path)).announce()
    assert "by <eos> (id 2), by its name; data.boundary takes another: </s>" in caplog.text


def test_ids_become_text(tmp_path):
    """Special tokens by their names, and bytes that are not UTF-8 as U+FFFD."""
    found = tokenizer("bytes")
    assert found.decode("né".encode()) == "né"
    assert found.decode(np.array([110, 195, 0])) == "n\ufffd\0"
    with pytest.raises(DataError, match="a byte is from 0 to 255 but an id is 256"):
        found.decode([3, 256])
    small.byte_level().save(str(tmp_path / "tokenizer.json"))
    found = tokenizer(str(tmp_path / "tokenizer.json"))
    ids = found.encode(["the néw <|endoftext|>"])[0]
    assert found.decode(ids) == "the néw <|endoftext|>"
    assert found.boundary not in ids
    assert found.decode([*ids.tolist(), found.boundary]).endswith("<|endoftext|><|endoftext|>")
