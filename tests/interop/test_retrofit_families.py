"""Every family: same logits and tokens after the conversion, training, saving and loading."""

import copy

import pytest
import torch

import manifold_hc as mhc
from manifold_hc.errors import ConfigError
from manifold_hc.interop import retrofit

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM

from tests.interop.tiny_models import (
    logits,
    relative_error,
    scatter,
    tiny,
    tokens,
)

FORMS = [*retrofit.FAMILIES, "gpt_neox:sequential", "stablelm:parallel"]

TRAINED = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma",
    "gemma3_text",
    "gpt2",
    "olmo",
    "olmo2",
    "cohere",
)
"""Families whose training, saving and loading is tested; they cover every form of a branch."""


def generated(model, **options):
    ids = tokens()
    # The second prompt is shorter and padded on the left.
    mask = torch.ones_like(ids)
    ids[1, :3], mask[1, :3] = 0, 0
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=0, **options
    )


@pytest.mark.parametrize("family", FORMS)
def test_starts_as_the_base_model(family):
    plain = tiny(family)
    wanted, text = logits(plain), generated(plain)
    for kind in ("residual", "hc", "mhc") if family in TRAINED else ("mhc",):
        model = retrofit.convert(copy.deepcopy(plain), kind)
        assert relative_error(logits(model), wanted) <= 1e-5, kind
    assert torch.equal(generated(model), text)
    if family in TRAINED:
        assert torch.equal(generated(model, use_cache=False), text)


@pytest.mark.parametrize("family", TRAINED)
def test_trains_and_reloads(family, tmp_path):
    plain = tiny(family)
    model = retrofit.convert(copy.deepcopy(plain), trainable="connections").train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.02)
    losses = []
    for _ in range(20):
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    wanted = logits(model.eval())
    assert relative_error(wanted, logits(plain)) > 1e-3
    assert torch.equal(generated(model), generated(model, use_cache=False))

    model.save_pretrained(tmp_path / "whole")
    assert torch.equal(logits(retrofit.load(tmp_path / "whole")), wanted)
    automatic = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert torch.equal(logits(automatic), wanted)
    with pytest.raises(Exception, match="retrofit: load this folder"):
        type(plain).from_pretrained(tmp_path / "whole")

    retrofit.save_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(retrofit.load_adapter(plain, tmp_path / "adapter")), wanted)


def test_the_multiplier_of_granite_is_part_of_the_branch():
    model = retrofit.convert(tiny("granite"))
    assert {s.scale for s in model.model.layers[0].hc_sublayers} == {"residual_multiplier"}
    assert model.config.residual_multiplier == 0.5


def test_a_family_is_added_by_one_entry(monkeypatch):
    plain = tiny("llama")
    monkeypatch.delitem(retrofit.FAMILIES, "llama")
    with pytest.raises(ConfigError, match=r"one of .*gpt2.*model_type is 'llama'.*retrofit.Family"):
        retrofit.convert(plain)
    entry = retrofit.Family(
        sublayers=(
            retrofit.Sublayer(("input_layernorm", "self_attn"), arguments_to="self_attn"),
            retrofit.Sublayer(("post_attention_layernorm", "mlp")),
        )
    )
    monkeypatch.setitem(retrofit.FAMILIES, "llama", entry)
    wanted = logits(plain)
    retrofit.convert(plain, example={"input_ids": tokens()})
    assert relative_error(logits(plain), wanted) <= 1e-5


def test_cross_attention_is_refused():
    with pytest.raises(ConfigError, match="add_cross_attention must be off for gpt2"):
        retrofit.convert(tiny("gpt2", add_cross_attention=True))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"constraint": "permutation"}, 1e-5),
        ({"constraint": "kronecker"}, 1e-5),
        ({"dynamic": False}, 1e-5),
        ({"disable": ("res",)}, 1e-5),
        ({"streams": 2}, 1e-5),
        ({"numerics": "deepseek_v4"}, 1e-4),  # about 1e-6 a sublayer
        ({"numerics": "deepseek_v41", "single_pass": False}, 1e-4),
        ({"kind": "hc", "dynamic": False}, 1e-4),  # its sum meets the epsilon of the final norm
    ],
)
def test_any_configuration(options, error, tmp_path):
    plain = tiny("qwen3")
    wanted = logits(plain)
    model = retrofit.convert(plain, config=mhc.ConnectionConfig(**options))
    assert relative_error(logits(model), wanted) <= error
    changed = logits(scatter(model, only="hc_stack"))
    model.save_pretrained(tmp_path)
    again = retrofit.load(tmp_path)
    assert again.hc_retrofit.connection == mhc.ConnectionConfig(**options)
    assert torch.equal(logits(again), changed)
