"""`generate` of our models as models of transformers, with and without a cache."""

import pytest
import torch
from transformers import DynamicCache

from tests.interop.our_models import MODELS, generate, model, tokens

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.mark.parametrize("name", MODELS)
def test_generation_is_the_same_with_and_without_a_cache(name):
    ours, given = model(name), tokens()
    with_cache = generate(ours, given)
    assert torch.equal(with_cache, generate(ours, given, use_cache=False))
    expected = given
    for _ in range(8):
        expected = torch.cat([expected, ours.decoder(expected)[:, -1:].argmax(-1)], 1)
    assert torch.equal(with_cache, expected)
    assert len(set(with_cache[:, 7:].flatten().tolist())) > 4


@pytest.mark.parametrize("name", ["residual", "mhc", "deepseek_v41", "experts"])
def test_generation_in_bfloat16_differs_at_ties_only(name):
    """Where the texts with and without cache part, the two tokens' logits are within rounding."""
    ours, given = model(name).to(torch.bfloat16), tokens()
    made, wanted = generate(ours, given), generate(ours, given, use_cache=False)
    for row in (made != wanted).any(1).nonzero().flatten().tolist():
        first = int((made[row] != wanted[row]).nonzero()[0])
        logits = ours(wanted[row : row + 1, :first]).logits[0, -1].float()
        chosen = logits[made[row, first]], logits[wanted[row, first]]
        assert abs(chosen[0] - chosen[1]) <= 2**-6 * logits.abs().max(), "no tie"
    parameters = dict(ours.named_parameters())
    assert all(p.dtype == torch.float32 for n, p in parameters.items() if "stack" in n)
    assert parameters["decoder.head.weight"].dtype == torch.bfloat16


def test_sampling_and_beam_search_are_the_same_with_and_without_a_cache():
    ours, given = model(), tokens()
    for options in (
        {"do_sample": True, "temperature": 1.3, "top_p": 0.9},
        {"num_beams": 4, "num_return_sequences": 2},
    ):
        made = []
        for use_cache in (True, False):
            torch.manual_seed(3)
            made.append(generate(ours, given, use_cache=use_cache, **options))
        assert torch.equal(*made)
    greedy = generate(ours, given)
    assert not torch.equal(made[0][::2], greedy)


def test_a_new_token_runs_alone_through_the_network():
    ours = model()
    passed = []
    ours.decoder.branches[0].register_forward_pre_hook(lambda _, u: passed.append(u[0].shape[1]))
    generate(ours, tokens(length=7), max_new_tokens=4)
    assert passed == [7, 1, 1, 1]
    passed.clear()
    generate(ours, tokens(length=7), max_new_tokens=4, use_cache=False)
    assert passed == [7, 8, 9, 10]


@pytest.mark.parametrize("name", ["mhc", "deepseek_v41"])
def test_a_padded_batch_gives_the_texts_of_its_prompts(name):
    ours, prompts = model(name), [tokens(1, length) for length in (3, 9, 5)]
    alone = [generate(ours, prompt)[0, prompt.shape[1] :] for prompt in prompts]
    ids = torch.full((3, 9), 7)
    mask = torch.zeros(3, 9, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, 9 - prompt.shape[1] :] = prompt
        mask[row, 9 - prompt.shape[1] :] = 1
    for use_cache in (True, False):
        made = ours.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
            use_cache=use_cache,
        )
        assert torch.equal(made[:, 9:], torch.stack(alone))


def test_a_chat_goes_on_with_the_cache_of_its_first_part():
    ours, given = model(), tokens(1, 12)
    cache = DynamicCache(config=ours.config)
    ours(given[:, :7], past_key_values=cache)
    assert cache.get_seq_length() == 7
    assert cache.layers[0].keys.shape == (1, 1, 7, 10 + 4)
    made = generate(ours, given, past_key_values=cache, max_new_tokens=3)
    assert torch.equal(made, generate(ours, given, max_new_tokens=3))
