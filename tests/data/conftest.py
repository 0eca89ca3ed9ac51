import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.conftest import generated_text


@pytest.fixture(scope="session")
def bpe(tmp_path_factory):
    """A function from (vocabulary size, special tokens) to the path of a trained tokenizer.json."""

    def train(size=300, special=("<|endoftext|>",)):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=list(special),
            initial_alphabet=alphabet,
            show_progress=False,
        )
        tokenizer.train_from_iterator([generated_text(20_000)], trainer)
        file = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
        tokenizer.save(str(file))
        return file

    return train
