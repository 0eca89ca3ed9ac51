"""The context of models with a table of positions."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from manifold_hc.data.tokenizer import ByteTokenizer
from manifold_hc.errors import ConfigError, DataError
from manifold_hc.interop.huggingface import Sampling, as_transformers, continue_texts
from manifold_hc.interop.huggingface.context import hard_context
from manifold_hc.interop.retrofit import convert
from tests.interop.our_models import model

pytestmark = pytest.mark.usefixtures("unchecked")

GPT2 = {"n_positions": 16, "n_embd": 16, "n_head": 2, "n_layer": 1}
SIZES = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "intermediate_size": 16,
    "max_position_embeddings": 16,
}
TABLES = {
    "gpt2": GPT2,
    "openai-gpt": GPT2,
    "gpt_bigcode": GPT2,
    "gptj": {**GPT2, "rotary_dim": 4},
    "ctrl": {**GPT2, "dff": 16},
    "opt": {**SIZES, "ffn_dim": 16, "word_embed_proj_dim": 16},
    "bert": {**SIZES, "is_decoder": True},
    "roberta": {**SIZES, "is_decoder": True, "max_position_embeddings": 18},
}
ANY_LENGTH = {
    "llama": SIZES,
    "bloom": {"hidden_size": 16, "n_head": 2, "n_layer": 1},
}


def build(kind, sizes):
    config = AutoConfig.for_model(kind, vocab_size=256, eos_token_id=0, **sizes)
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def run(made, length):
    made(torch.full((1, length), 65))


@pytest.mark.parametrize("kind", TABLES)
def test_the_context_is_the_longest_text_that_runs(kind):
    made = build(kind, TABLES[kind])
    assert hard_context(made) == 16
    run(made, 16)
    with pytest.raises((IndexError, RuntimeError)):
        run(made, 17)


@pytest.mark.parametrize("kind", ANY_LENGTH)
def test_other_positions_have_no_end(kind):
    made = build(kind, ANY_LENGTH[kind])
    assert hard_context(made) is None
    run(made, 40)


def test_our_models_have_no_end():
    assert hard_context(model()) is None


@pytest.mark.parametrize("converted", [False, True])
def test_texts_beyond_the_context_are_refused_before_the_first_token(converted):
    made, names = build("gpt2", TABLES["gpt2"]), as_transformers(ByteTokenizer())
    if converted:
        made = convert(made, streams=2)

    def texts(prompts, tokens):
        greedy = Sampling(tokens, temperature=0.0)
        return [text.tokens for text in continue_texts(made, names, prompts, greedy)]

    assert texts(["First", "It was it"], 7) == [7, 7]
    wanted = (
        "max_tokens: must be at most 7 but is 8, since the context length of the model is 16 and "
        "prompt 2 has 9 tokens; use --max-tokens 7"
    )
    with pytest.raises(ConfigError, match=wanted):
        texts(["First", "It was it"], 8)
    wanted = "prompt 1: has 16 tokens but the context length of the model is 16; give at most 15"
    with pytest.raises(DataError, match=wanted):
        texts(["It was it, it is"], 1)
