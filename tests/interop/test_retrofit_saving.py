"""Saved retrofits: whole models and adapters; every fault is named and nothing is changed."""

import dataclasses
import json
import shutil

import pytest
import torch

import manifold_hc as mhc
from manifold_hc.errors import CheckpointError, ConfigError
from manifold_hc.interop import retrofit

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
)

from tests.interop.tiny_models import logits, scatter, tiny, tokens

BIAS = "model.layers.1.hc_stack.connections.2.maps.bias"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of a converted model as a whole and as an adapter; read only."""
    folder = tmp_path_factory.mktemp("saved")
    model = scatter(retrofit.convert(tiny("llama")), only="hc_stack")
    model.save_pretrained(folder / "whole")
    retrofit.save_adapter(model, folder / "adapter")
    return folder, logits(model)


def edited(folder, target, change):
    """A copy of a saved folder with other tensors."""
    shutil.copytree(folder, target)
    (file,) = target.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return target


def rename(tensors):
    tensors["model.layers.1.hc_stack.odd"] = tensors.pop(BIAS)


def misshape(tensors):
    tensors[BIAS] = tensors[BIAS][:-1].clone()


FAULTS = [
    (lambda tensors: tensors.pop(BIAS), [f"missing: {BIAS}"]),
    (lambda tensors: tensors.update(odd=torch.zeros(1)), ["left over: odd"]),
    (rename, [f"missing: {BIAS}", r"left over: model.layers.1.hc_stack.odd"]),
    (misshape, [rf"{BIAS} is \[23\] and not \[24\]"]),
    (
        lambda tensors: tensors.pop("model.norm.weight"),
        [r"missing: model.norm.weight"],
    ),
]


@pytest.mark.parametrize(("change", "messages"), FAULTS)
def test_a_whole_model_must_fit_exactly(saved, tmp_path, change, messages):
    folder = edited(saved[0] / "whole", tmp_path / "edited", change)
    for load in (retrofit.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError) as error:
            load(folder)
        for message in messages:
            error.match(message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(BIAS), f"{BIAS} is missing"),
        (lambda tensors: tensors.update(odd=torch.zeros(1)), "odd is left over"),
        (rename, f"{BIAS} is missing, model.layers.1.hc_stack.odd is left over"),
        (misshape, rf"{BIAS} is \[23\] and not \[24\]"),
    ],
)
def test_an_adapter_must_fit_exactly(saved, tmp_path, change, message):
    folder = edited(saved[0] / "adapter", tmp_path / "edited", change)
    with pytest.raises(CheckpointError, match=r"is damaged or another"):
        retrofit.load_adapter(tiny("llama"), folder)
    record = json.loads((folder / "retrofit.json").read_text())
    del record["sha256"]
    with pytest.raises(CheckpointError, match=r"is damaged or another"):
        retrofit.load_adapter(tiny("llama"), folder)
    record["sha256"] = _sha256(folder / "connections.safetensors")
    (folder / "retrofit.json").write_text(json.dumps(record))
    plain = tiny("llama")
    wanted = logits(plain)
    with pytest.raises(CheckpointError, match=message):
        retrofit.load_adapter(plain, folder)
    assert type(plain).__module__.startswith("transformers")
    assert not any("hc_stack" in name for name, _ in plain.named_modules())
    assert torch.equal(logits(plain), wanted)

    converted = retrofit.convert(plain)
    before = {name: p.clone() for name, p in converted.named_parameters()}
    with pytest.raises(CheckpointError, match=message):
        retrofit.load_adapter(converted, folder)
    for name, parameter in converted.named_parameters():
        assert torch.equal(parameter, before[name])


def _sha256(path):
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_an_adapter_goes_to_its_base_model_only(saved):
    folder, wanted = saved
    other = tiny("llama", seed=5)
    other.name_or_path = "some/other"
    with pytest.raises(
        CheckpointError,
        match=r"belongs to the base model 'LlamaForCausalLM' "
        r"\(fingerprint \w{16}, float32\) but the model is 'some/other' \(fingerprint",
    ):
        retrofit.load_adapter(other, folder / "adapter")
    half = retrofit.load_adapter(tiny("llama").to(torch.bfloat16), folder / "adapter")
    assert half.lm_head.weight.dtype == torch.bfloat16
    assert half.get_parameter(BIAS).dtype == torch.float32
    converted = retrofit.convert(tiny("llama"))
    assert torch.equal(logits(retrofit.load_adapter(converted, folder / "adapter")), wanted)
    hc = retrofit.convert(tiny("llama"), "hc")
    with pytest.raises(CheckpointError, match=r"convert the model with the adapter's") as error:
        retrofit.load_adapter(hc, folder / "adapter")
    error.match(r"but kind is 'mhc' in the adapter and 'hc' in the model, exit is None")
    assert "streams" not in str(error.value)


def test_an_adapter_needs_an_unchanged_base_model(tmp_path):
    model = retrofit.convert(tiny("llama"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model(tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    with pytest.raises(CheckpointError, match="the base model must be unchanged since convert"):
        retrofit.save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="must be a converted model but is not"):
        retrofit.save_adapter(tiny("llama"), tmp_path)


def change_entry(model):
    model.model.layers[1].mlp.up_proj.weight[3, 4] = 5.0


def change_row(model):
    model.model.embed_tokens.weight[17, 16:] += 0.25


def change_a_little(model):
    model.model.layers[2].self_attn.k_proj.weight[1, 7] += 1e-3


@pytest.mark.parametrize("change", [change_entry, change_row, change_a_little])
def test_one_changed_value_of_the_base_model_is_found(saved, tmp_path, change):
    model = retrofit.convert(tiny("llama"))
    with torch.no_grad():
        change(model)
    with pytest.raises(CheckpointError, match="the base model must be unchanged since convert"):
        retrofit.save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())
    base = tiny("llama")
    with torch.no_grad():
        change(base)
    with pytest.raises(CheckpointError, match="belongs to the base model"):
        retrofit.load_adapter(base, saved[0] / "adapter")


def test_one_changed_value_in_another_dtype_is_found(saved):
    for dtype in (torch.bfloat16, torch.float64):
        retrofit.load_adapter(tiny("llama").to(dtype), saved[0] / "adapter")
        base = tiny("llama").to(dtype)
        with torch.no_grad():
            base.model.layers[1].mlp.up_proj.weight[3, 4] += 0.01
        with pytest.raises(CheckpointError, match="belongs to the base model"):
            retrofit.load_adapter(base, saved[0] / "adapter")


def test_files_with_fields_left_out(saved, tmp_path):
    """Missing fields take their default; a base model without all digests is not recognised."""
    folder = tmp_path / "copy"
    shutil.copytree(saved[0] / "adapter", folder)
    record = json.loads((folder / "retrofit.json").read_text())
    assert record["connection"]["streams"] == 4
    record["connection"] = {"kind": "mhc"}
    (folder / "retrofit.json").write_text(json.dumps(record))
    assert torch.equal(logits(retrofit.load_adapter(tiny("llama"), folder)), saved[1])
    del record["base"]["rounded"], record["base"]["dtype"]
    (folder / "retrofit.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="by an earlier version, which did not read all val"):
        retrofit.load_adapter(tiny("llama"), folder)


def test_damaged_files_are_named(saved, tmp_path):
    with pytest.raises(CheckpointError, match=r"must have retrofit.json and connections.safet"):
        retrofit.load_adapter(tiny("llama"), tmp_path)
    folder = tmp_path / "copy"
    shutil.copytree(saved[0] / "adapter", folder)
    record = json.loads((folder / "retrofit.json").read_text())
    record["connection"]["depth"] = 3
    (folder / "retrofit.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="unknown field 'depth'"):
        retrofit.load_adapter(tiny("llama"), folder)
    (folder / "retrofit.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"retrofit.json is not JSON"):
        retrofit.load_adapter(tiny("llama"), folder)


def test_plain_models_are_not_retrofits(saved, tmp_path):
    plain = tiny("llama")
    plain.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="must be a saved retrofit but its model_type is 'l"):
        retrofit.load(tmp_path)
    converted = type(retrofit.load(saved[0] / "whole"))
    with pytest.raises(CheckpointError, match="must be a saved retrofit but is a plain llama"):
        converted.from_pretrained(tmp_path)


def test_transformers_alone_refuses_a_retrofit(saved, monkeypatch):
    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", {})
    with pytest.raises(ValueError, match=r"does not recognize this architecture"):
        AutoModelForCausalLM.from_pretrained(saved[0] / "whole")


def test_the_configuration_file(saved):
    values = json.loads((saved[0] / "whole" / "config.json").read_text())
    assert values["model_type"] == "manifold_hc_retrofit"
    assert values["base_model_type"] == "llama"
    assert values["architectures"] == ["LlamaForCausalLM"]
    fields = {field.name for field in dataclasses.fields(mhc.ConnectionConfig)}
    assert values["connection"].keys() == fields - {"backend", "fuse_boundaries"}
    assert values["connection"]["kind"] == "mhc"
    config = AutoConfig.from_pretrained(saved[0] / "whole")
    assert config.hidden_size == 32
    built = AutoModelForCausalLM.from_config(config)
    assert built.hc_retrofit.connection == mhc.ConnectionConfig()
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModelForImageTextToText.from_config(config)


def test_saved_in_bfloat16(saved, tmp_path):
    half = retrofit.load(saved[0] / "whole", dtype=torch.bfloat16)
    assert half.lm_head.weight.dtype == torch.bfloat16
    half.save_pretrained(tmp_path)
    again = retrofit.load(tmp_path)
    assert again.lm_head.weight.dtype == torch.bfloat16
    whole = load_file(saved[0] / "whole" / "model.safetensors")
    assert torch.equal(again.get_parameter(BIAS), whole[BIAS])
    assert torch.equal(logits(again), logits(half))


def test_other_heads(tmp_path):
    """A base model without its head, and one with another head, of the same family."""
    inner = scatter(retrofit.convert(tiny("llama").model), only="hc_stack")
    inner.save_pretrained(tmp_path / "inner")
    again = AutoModel.from_pretrained(tmp_path / "inner")
    wanted = inner(tokens()).last_hidden_state
    assert torch.equal(again(tokens()).last_hidden_state, wanted)
    assert torch.equal(retrofit.load(tmp_path / "inner")(tokens()).last_hidden_state, wanted)

    config = tiny("llama").config
    config.num_labels = 3
    head = retrofit.convert(AutoModelForSequenceClassification.from_config(config).eval())
    assert head(tokens()).logits.shape == (2, 3)
    head.save_pretrained(tmp_path / "head")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "head")
    assert torch.equal(logits(again), logits(head))


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForSequenceClassification])
def test_another_class_than_the_saved_one_is_named(saved, auto):
    with pytest.raises(
        CheckpointError,
        match=r"whole holds a LlamaForCausalLM but is loaded as a Llama\w+, which has other "
        r"tensors; load it with AutoModelForCausalLM or manifold_hc.interop.retrofit.load$",
    ):
        auto.from_pretrained(saved[0] / "whole")
