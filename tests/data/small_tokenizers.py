"""Small tokenizers of every model, trained on a generated text."""

import json

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

SPECIAL = ["<unk>", "</s>", "<|endoftext|>"]
TRAINING = ["the end of the text, <unk> and </s>: 12 345 words\nof a line < | / > "] * 30

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
DIGITS_FROM_THE_RIGHT = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))| ?\p{L}+|[^\s\p{L}\p{N}]+|\s+"


def byte_level(pattern=WORDS):
    """BPE of bytes, words by a regular expression: GPT, Llama 3, Qwen, DeepSeek."""
    trained = Tokenizer(models.BPE())
    trained.decoder = decoders.ByteLevel()
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), BYTES]
    )
    return _trained(trained, trainers.BpeTrainer, initial_alphabet=BYTES.alphabet())


def sentencepiece_bpe(*, joins_words=False):
    """BPE of characters without a pre-tokenizer: Llama 2, Mistral, Gemma."""
    trained = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    steps = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if joins_words:
        trained.normalizer = steps
    else:
        trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained = _trained(trained, trainers.BpeTrainer)
    if joins_words:
        return trained
    content = json.loads(trained.to_str()) | {"pre_tokenizer": None}
    trained = Tokenizer.from_str(json.dumps(content))
    trained.normalizer = steps
    return trained


def unigram(scheme="always"):
    """Unigram: T5, XLM-R."""
    trained = Tokenizer(models.Unigram())
    trained.normalizer = normalizers.NFKC()
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    return _trained(trained, trainers.UnigramTrainer, vocab_size=80, unk_token="<unk>")


def wordpiece():
    """WordPiece: BERT."""
    trained = Tokenizer(models.WordPiece(unk_token="<unk>"))
    trained.normalizer = normalizers.BertNormalizer()
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return _trained(trained, trainers.WordPieceTrainer)


def wordlevel(split=None):
    """WordLevel, whose words may spell a special token."""
    trained = Tokenizer(models.WordLevel(unk_token="<unk>"))
    trained.pre_tokenizer = split or pre_tokenizers.WhitespaceSplit()
    return _trained(trained, trainers.WordLevelTrainer)


def counted():
    """A pre-tokenizer that counts characters from the beginning."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.FixedLength(5)
    return _trained(trained, trainers.BpeTrainer)


def _trained(tokenizer, trainer, vocab_size=400, **settings):
    tokenizer.train_from_iterator(
        TRAINING,
        trainer(vocab_size=vocab_size, special_tokens=SPECIAL, show_progress=False, **settings),
    )
    tokenizer.add_special_tokens(["<|extra|>"])  # outside the model's own vocabulary
    tokenizer.add_tokens([AddedToken("<table>", special=False, normalized=False)])
    return tokenizer
