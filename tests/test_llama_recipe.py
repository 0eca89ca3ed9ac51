"""The recipe of docs/pretrained.md for a Hugging Face model, executed from the page."""

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[1] / "docs" / "pretrained.md"


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Namespace of the executed recipe, run in an empty folder."""
    pytest.importorskip("transformers")
    section = PAGE.read_text().partition("### A Hugging Face model")[2]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "recipe"}
    exec(compile(code, str(PAGE), "exec"), names)  # its own checks compare the logits
    return names


def test_a_plain_checkpoint_starts_as_the_plain_model(recipe):
    llama, plain, tokens = recipe["llama"], recipe["plain"], recipe["tokens"]
    assert all(parameter.isfinite().all() for parameter in llama.parameters())
    assert len(recipe["report"]["missing_keys"]) == 2 * 3 * 3  # sublayers, parameters of each
    assert not recipe["report"]["unexpected_keys"]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(tokens)
    assert torch.equal(llama.generate(tokens, **options), plain.generate(tokens, **options))
    half = recipe["StreamLlama"].from_pretrained("plain", dtype=torch.bfloat16)
    assert half(tokens).logits.isfinite().all()


def test_its_own_checkpoint_is_read_back(recipe):
    llama, tokens = recipe["llama"], recipe["tokens"]
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    llama.save_pretrained("own")
    again = recipe["StreamLlama"].from_pretrained("own")
    assert torch.equal(again(tokens).logits, llama(tokens).logits)
    half = recipe["StreamLlama"].from_pretrained("own", dtype=torch.bfloat16)
    for name, parameter in half.named_parameters():
        if "_hc." in name:
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, llama.get_parameter(name))
