import json

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from manifold_hc.data.tokenizer import narrowest, tokenizer
from manifold_hc.errors import ConfigError, DataError


def test_bytes():
    found = tokenizer("bytes")
    assert [ids.tolist() for ids in found.encode(["Straße", ""])] == [list("Straße".encode()), []]
    assert (found.vocabulary, found.boundary, found.fingerprint) == (256, 0, "bytes")
    with pytest.raises(ConfigError, match="bytes have the byte 0"):
        tokenizer("bytes", boundary="<eos>")


def test_a_tokenizer_file_gives_its_own_ids_without_special_ones(bpe):
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


def test_truncation_padding_and_frames_in_the_file_are_left_out(bpe, tmp_path):
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


def test_what_is_no_tokenizer_is_named(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        tokenizer(str(tmp_path / "nowhere.json"))
    (tmp_path / "other.json").write_text(json.dumps({"model": 3}))
    with pytest.raises(DataError, match=r"other\.json is no tokenizer\.json"):
        tokenizer(str(tmp_path / "other.json"))


def test_ids_take_no_more_room_than_they_need():
    assert [narrowest(v) for v in (256, 257, 65536, 65537)] == [
        "uint8",
        "uint16",
        "uint16",
        "uint32",
    ]
