"""Tokenizers in transformers, and texts that models continue."""

from functools import partial

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from manifold_hc.data.tokenizer import ByteTokenizer, tokenizer
from manifold_hc.errors import CheckpointError, ConfigError
from manifold_hc.interop.huggingface import (
    Sampling,
    as_transformers,
    continue_texts,
    open_model,
)
from manifold_hc.interop.huggingface.generation import Detokenizer
from manifold_hc.interop.retrofit import convert
from tests.data import small_tokenizers
from tests.interop.our_models import damage, model

pytestmark = pytest.mark.usefixtures("unchecked")

TRAINED = {
    "byte level": small_tokenizers.byte_level,
    "SentencePiece BPE": small_tokenizers.sentencepiece_bpe,
    "SentencePiece BPE over words": partial(small_tokenizers.sentencepiece_bpe, joins_words=True),
    "Unigram": small_tokenizers.unigram,
    "WordPiece": small_tokenizers.wordpiece,
}

ODD = [
    "",
    " ",
    "Hello, world",
    "  two  spaces\n\n\ttab\r\n",
    "é ĀĂ 你好 \U0001f600\U0001f468\u200d\U0001f469",
    "a\u0301 \u0000\ufeff\u2028 \ufffd",
    "<|endoftext|></s> [SEP] <s><unk>",
    "aeio <|endoftext|>nrst",
    "▁▁ ##x Ġ Ċ",
]


def test_bytes_have_the_same_ids_in_transformers(tmp_path):
    made = as_transformers(ByteTokenizer())
    made.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    every = "".join(map(chr, range(0x800)))
    for text in (*ODD, every):
        for found in (made, loaded):
            ids = found(text)["input_ids"]
            assert ids == list(text.encode())
            assert found.decode(ids) == text
    assert (
        PreTrainedTokenizerFast.from_pretrained(tmp_path)("It é")["input_ids"]
        == made("It é")["input_ids"]
    )
    for byte in range(256):
        assert loaded.decode([byte]) == bytes([byte]).decode(errors="replace")
    assert (loaded.eos_token_id, loaded.pad_token_id, len(loaded)) == (0, 0, 256)


@pytest.mark.parametrize("name", TRAINED)
def test_files_have_the_same_ids_in_transformers(name, tmp_path, caplog):
    """Also for a text that spells a special token, unless a warning says so; saved and loaded."""
    TRAINED[name]().save(str(tmp_path / "tokenizer.json"))
    ours = tokenizer(str(tmp_path / "tokenizer.json"))
    as_transformers(ours).save_pretrained(tmp_path / "saved")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    warned = "a text that spells <|endoftext|> gets another id here" in caplog.text
    assert warned == (name == "Unigram")
    for text in ODD:
        if not (warned and "|>" in text):
            assert loaded(text)["input_ids"] == ours.encode([text])[0].tolist(), text
    assert loaded.eos_token_id == ours.boundary


def test_text_comes_in_whole_characters():
    made = as_transformers(ByteTokenizer())
    text = "é 你\U0001f600!\n"
    detokenizer = Detokenizer(made, list(b"It "))
    pieces = [detokenizer.add(byte) for byte in text.encode()]
    assert pieces == ["", "é", " ", "", "", "你", "", "", "", "\U0001f600", "!", "\n"]
    assert detokenizer.end() == ""
    pieces = [detokenizer.add(byte) for byte in b"\xff\xe4\xbd"]
    assert pieces == ["", "", ""]
    assert detokenizer.end() == "\ufffd\ufffd"


def test_texts_of_a_seed_and_their_end():
    ours, made = model(vocabulary=256), as_transformers(ByteTokenizer())
    ours.generation_config.eos_token_id = list(range(0x21, 0x30))
    prompts = ["a b", "é", "Hello"]

    def texts(**options):
        return list(continue_texts(ours, made, prompts, Sampling(30, **options), batch=2))

    first = texts(seed=1)
    assert texts(seed=1) == first
    assert texts(seed=1, cache=False) == first
    assert texts(seed=2) != first
    assert texts(temperature=0.0) == texts(temperature=0.0, seed=9)
    assert [text.prompt for text in first] == prompts
    assert [text.prompt_tokens for text in first] == [3, 2, 5]
    assert any(text.ended for text in first)
    for text in first:
        assert text.ended or text.tokens == 30
        assert not {*text.text} & {*"!\"#$%&'()*+,-./"}  # the end tokens


def test_a_stream_is_the_text():
    ours, made = model(vocabulary=256), as_transformers(ByteTokenizer())
    ours.generation_config.eos_token_id = [0x21, 0x22]
    ours.generation_config.suppress_tokens = [*range(0xC3), *range(0xC4, 0x100)][0x80:]
    longest = 0
    for seed in range(3):
        pieces = []
        sampling = Sampling(40, temperature=0.7, top_p=0.8, seed=seed)
        (text,) = continue_texts(ours, made, ["é"], sampling, on_text=pieces.append)
        assert "".join(pieces) == text.text
        longest = max(longest, len(pieces))
    assert longest > 10
    with pytest.raises(ConfigError, match="streams one prompt but there are 2"):
        list(continue_texts(ours, made, ["a", "b"], sampling, on_text=pieces.append))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_tokens": 0}, "max_tokens: must be at least 1"),
        ({"temperature": -0.5}, "temperature: must be a number from 0 on"),
        ({"temperature": float("nan")}, "temperature: must be a number from 0 on"),
        ({"top_p": 0.0}, "top_p: must be above 0 and at most 1 but is 0.0"),
        ({"top_p": 1.5}, "top_p: must be above 0 and at most 1 but is 1.5"),
        ({"seed": -1}, "seed: must be from 0"),
    ],
)
def test_settings_with_a_mistake(values, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**values)


def test_models_of_transformers_itself_are_opened(tmp_path):
    """Another architecture, converted or not, strictly: `mhc generate` takes these folders too."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=1, **sizes))
    llama.save_pretrained(tmp_path)
    as_transformers(ByteTokenizer()).save_pretrained(tmp_path)
    found, made = open_model(tmp_path)
    (text,) = continue_texts(found, made, ["It was"], Sampling(5, temperature=0.0))
    assert (text.prompt_tokens, text.tokens) == (6, 5)
    with pytest.raises(ConfigError, match="without steps"):
        open_model(tmp_path, step=3)
    convert(llama, streams=2).save_pretrained(tmp_path / "converted")
    made.save_pretrained(tmp_path / "converted")
    found, made = open_model(tmp_path / "converted")
    assert sum("maps.phi" in name for name, _ in found.named_parameters()) > 0
    (again,) = continue_texts(found, made, ["It was"], Sampling(5, temperature=0.0))
    assert again == text
    damage(tmp_path, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"another model; missing keys: model\.norm\.weight"):
        open_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}')
    with pytest.raises(CheckpointError, match=r"cannot be loaded: .*unheard_of"):
        open_model(tmp_path)
