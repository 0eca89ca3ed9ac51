"""Our models as models of transformers: loading, saving, training."""

import doctest
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, StaticCache

from manifold_hc.config import ConnectionConfig
from manifold_hc.data.tokenizer import ByteTokenizer
from manifold_hc.errors import CheckpointError, ConfigError, ShapeError
from manifold_hc.interop.huggingface import (
    ManifoldConfig,
    ManifoldForCausalLM,
    as_transformers,
    continue_texts,
    export,
    open_model,
)
from manifold_hc.interop.loading import load
from manifold_hc.models import AttentionConfig, Decoder, DecoderConfig
from manifold_hc.models.cache import LatentCache
from tests.interop.our_models import MODELS, V, damage, model, tokens

pytestmark = pytest.mark.usefixtures("unchecked")

DOCUMENTED = (
    ManifoldConfig,
    ManifoldForCausalLM,
    LatentCache,
    as_transformers,
    continue_texts,
    export,
    load,
)


@pytest.mark.parametrize("documented", DOCUMENTED, ids=lambda documented: documented.__name__)
def test_examples_run(documented, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = doctest.DocTestFinder(recurse=False).find(documented, documented.__name__)
    assert example.examples
    report = []
    failed, _ = doctest.DocTestRunner(verbose=False).run(example, out=report.append)
    assert not failed, "".join(report)


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_is_loaded_by_auto_classes(name, tmp_path):
    ours = model(name)
    ours.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert type(loaded) is ManifoldForCausalLM
    assert loaded.decoder.stack.config == MODELS[name][0]
    given = tokens()
    assert torch.equal(loaded(given).logits, ours(given).logits)
    assert torch.equal(ours(given).logits, ours.decoder(given))


def test_the_loss_is_that_of_the_next_token():
    ours, given = model(), tokens()
    labels = given.clone()
    labels[0, :3] = -100
    found = ours(given, labels=labels)
    wanted = cross_entropy(found.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(found.loss, wanted)
    summed = ours(given, labels=labels, num_items_in_batch=5).loss
    torch.testing.assert_close(summed, wanted * 10 / 5)
    as_tuple = ours(given, labels=labels, return_dict=False)
    assert torch.equal(as_tuple[0], found.loss)
    assert ours(given, logits_to_keep=2).logits.shape == (2, 2, V)
    chosen = ours(given, logits_to_keep=torch.tensor([1, 4])).logits
    assert torch.equal(chosen, found.logits[:, [1, 4]])


def test_gradient_checkpointing_recomputes_the_streams():
    ours, given = model(), tokens()

    def gradients():
        ours.zero_grad()
        ours(given, labels=given).loss.backward()
        return [p.grad for p in ours.parameters() if p.grad is not None]

    wanted = gradients()
    ours.activation_checkpointing_enable()
    assert ours.is_activation_checkpointing
    assert ours.decoder.stack.block_length == 2
    for found, other in zip(gradients(), wanted, strict=True):
        assert torch.equal(found, other)
    ours.activation_checkpointing_disable()
    assert ours.decoder.stack.block_length is None
    with pytest.raises(ConfigError, match="every_n_layers must be 1"):
        ours.activation_checkpointing_enable(every_n_layers=2)


def test_the_trainer_trains_it(tmp_path):
    """With gradient checkpointing, bfloat16 autocast and accumulation over batches."""
    from transformers import Trainer, TrainingArguments

    ours = model("experts")
    rows = [{"input_ids": row, "labels": row} for row in tokens(1, 12).expand(16, 12).clone()]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        activation_checkpointing=True,
        bf16=True,
        learning_rate=2e-2,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=ours, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    trainer.save_model(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name


def test_loading_in_bfloat16_keeps_coefficients_in_float32(tmp_path):
    ours = model("experts")
    ours.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    wanted = ours.state_dict()
    for name, tensor in loaded.state_dict().items():
        wide = ".stack." in name or ".router." in name
        assert tensor.dtype == (torch.float32 if wide else torch.bfloat16), name
        assert torch.equal(tensor, wanted[name].to(tensor.dtype)), name
    loaded.save_pretrained(tmp_path / "half")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert again.dtype == torch.bfloat16
    given = tokens()
    assert torch.equal(again(given).logits, loaded(given).logits)


LACKING = {
    "stack.connections.1.maps.phi": 0.3,
    "branches.3.router.weight": 0.3,
    "branches.3.routed.down": 0.3,
    "branches.1.gate_up": 0.3,
    "branches.0.latent_norm.weight": 0.0,
    "norm.weight": 0.0,
    "branches.3.router.bias": 0.0,
}
"""Tensors of the model with experts, and the standard deviation of their initial values."""


def test_transformers_initialises_what_a_checkpoint_lacks(tmp_path):
    """As a decoder would, and nothing else; buffers that no checkpoint holds too."""
    model("experts").save_pretrained(tmp_path)
    lacking = {f"decoder.{name}" for name in LACKING}
    damage(tmp_path, lambda tensors: [tensors.pop(name) for name in lacking])
    for _ in range(2):
        loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert report["missing_keys"] == lacking
        kept = load_file(tmp_path / "model.safetensors")
        found = loaded.state_dict()
        for name, tensor in kept.items():
            assert torch.equal(found[name], tensor), name
        for name, std in LACKING.items():
            assert abs(found[f"decoder.{name}"].std() - std) <= 0.2 * std, name
        assert (found["decoder.norm.weight"] == 1).all()
        assert loaded.decoder.branches[3].router.load.count_nonzero() == 0
    with pytest.raises(CheckpointError, match=r"missing: decoder\.branches\.0\.latent_norm"):
        open_model(tmp_path)


def test_a_new_model_has_the_weights_of_a_decoder():
    torch.manual_seed(5)
    ours = model("experts")
    torch.manual_seed(5)
    decoder = Decoder(ours.config.decoder_config, ours.config.connection_config)
    for name, tensor in decoder.state_dict().items():
        assert torch.equal(ours.decoder.state_dict()[name], tensor), name
    wrapped = ManifoldForCausalLM.of(decoder)
    assert wrapped.decoder is decoder
    assert not any(p.is_meta for p in wrapped.parameters())


def test_the_vocabulary_can_be_resized(tmp_path):
    ours, given = model(), tokens()
    before = ours(given).logits
    ours.resize_token_embeddings(60)
    after = ours(given).logits
    assert after.shape[-1] == ours.config.vocab_size == ours.decoder.config.vocabulary == 60
    torch.testing.assert_close(after[..., :V], before)
    ours.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(given).logits, after)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modell": {}}, "ManifoldConfig: modell is no key; sizes belong to model or connection"),
        ({"model": {"chanels": 3}}, r"model\.chanels: is not a key .* did you mean channels"),
        ({"model": {"experts": {"x": 3}}}, r"model\.experts\.x: is not a key of ExpertsConfig"),
        ({"model": {"channels": 0}}, r"model\.channels: must be at least 1"),
        ({"model": [3]}, r"model: must be a mapping of keys but is \[3\]"),
        ({"connection": {"kind": "mch"}}, r"connection\.kind: must be residual, hc or mhc"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings: must be False"),
    ],
)
def test_a_configuration_with_a_mistake(values, message):
    with pytest.raises(ConfigError, match=message):
        ManifoldConfig(**values)


def test_a_configuration_survives_json(tmp_path):
    config = ManifoldConfig(
        model={"blocks": 3, "attention": {"heads": 2}},
        connection=ConnectionConfig(disable=("post",), streams=3),
    )
    config.save_pretrained(tmp_path)
    again = ManifoldConfig.from_pretrained(tmp_path)
    assert again.decoder_config == DecoderConfig(blocks=3, attention=AttentionConfig(heads=2))
    assert again.connection_config == config.connection_config
    assert json.loads((tmp_path / "config.json").read_text())["connection"]["streams"] == 3


def test_calls_that_cannot_be_served():
    ours, given = model(), tokens()
    with pytest.raises(ShapeError, match=r"attention_mask must be \[B, S\]"):
        ours(given, attention_mask=torch.ones(2, 1, 7, 7))
    cache = StaticCache(config=ours.config, max_cache_len=20)
    with pytest.raises(ConfigError, match="must grow with the tokens but is a StaticCache"):
        ours(given, past_key_values=cache)
    with pytest.raises(TypeError, match="attention_maks"):
        ours(given, attention_maks=torch.ones(2, 7))
    with pytest.raises(TypeError, match="inputs_embeds"):
        ours.generate(inputs_embeds=torch.randn(1, 3, 24), max_new_tokens=2)


FRESH = """
import sys, warnings
warnings.simplefilter("ignore")
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
print("RESULT", AutoTokenizer.from_pretrained(folder)("é")["input_ids"])
assert "manifold_hc" not in sys.modules
for options in ({"trust_remote_code": False}, {}):
    try:
        AutoModelForCausalLM.from_pretrained(folder, **options)
    except ValueError as error:
        print("RESULT", "trust_remote_code=True" in str(error))
assert "manifold_hc" not in sys.modules
print("RESULT", type(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)).__name__)
"""


def test_a_process_that_imports_nothing_needs_trust_remote_code(tmp_path):
    """transformers refuses otherwise; tokenizers load in any case."""
    model().save_pretrained(tmp_path)
    as_transformers(ByteTokenizer()).save_pretrained(tmp_path)
    root = str(Path(__file__).parent.parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": root, "HF_MODULES_CACHE": str(tmp_path / "modules")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    results = re.findall("RESULT (.*)", done.stdout)
    assert results == ["[195, 169]", "True", "True", "ManifoldForCausalLM"]
