"""Converted models under the Trainer of transformers and under PEFT."""

import copy

import pytest
import torch

from manifold_hc.errors import ConfigError
from manifold_hc.interop import retrofit

pytest.importorskip("transformers")
pytest.importorskip("peft")

from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments, set_seed

from tests.interop.tiny_models import logits, scatter, tiny, tokens

# At save, PEFT looks for the file of the base model, which these models never had.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Could not find a config file:UserWarning:peft",
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning:transformers",
    "ignore:.*pin_memory:UserWarning:torch",
)

DATA = [{"input_ids": row, "labels": row} for row in tokens(8, 12)]


def trained(model, folder, steps, resume=None):
    set_seed(0)
    arguments = TrainingArguments(
        folder,
        max_steps=steps,
        save_steps=2,
        logging_steps=1,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        bf16=True,
        activation_checkpointing=True,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=DATA)
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("trainable", ["all", "connections"])
def test_trainer_in_bf16_with_checkpointing(trainable, tmp_path):
    model = retrofit.convert(tiny("llama"), trainable=trainable)
    losses = trained(model, tmp_path / "run", 4)
    assert min(losses[2:]) < min(losses[:2])
    assert {p.dtype for name, p in model.named_parameters() if "hc_stack" in name} == {
        torch.float32
    }
    again = retrofit.load(tmp_path / "run" / "checkpoint-4")
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter)

    other = retrofit.convert(tiny("llama"), trainable=trainable)
    resumed = trained(other, tmp_path / "run", 4, str(tmp_path / "run" / "checkpoint-2"))
    assert resumed == losses
    for name, parameter in model.named_parameters():
        assert torch.equal(other.get_parameter(name), parameter)


def lora():
    return LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "v_proj"],
        modules_to_save=retrofit.MODULES_TO_SAVE,
    )


def test_peft_trains_saves_and_loads(tmp_path):
    plain = tiny("llama")
    model = get_peft_model(retrofit.convert(copy.deepcopy(plain)), lora()).train()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert sum("lora_" in name for name in trainable) == 2 * 2 * 3
    assert sum("maps.modules_to_save" in name for name in trainable) == 2 * 3 * 3
    assert len(trainable) == 2 * 2 * 3 + 2 * 3 * 3
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05

    wanted = logits(model.eval())
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="must not be wrapped by PEFT"):
        retrofit.save_adapter(model, tmp_path / "adapter")
    model.save_pretrained(tmp_path / "peft")
    again = PeftModel.from_pretrained(retrofit.convert(copy.deepcopy(plain)), tmp_path / "peft")
    assert torch.equal(logits(again.eval()), wanted)

    options = {"attention_mask": torch.ones_like(tokens()), "max_new_tokens": 3, "do_sample": False}
    text = model.generate(input_ids=tokens(), **options)
    merged = model.merge_and_unload()
    assert torch.equal(merged.generate(tokens(), **options), text)
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(retrofit.load(tmp_path / "merged")), logits(merged))


def test_peft_over_a_saved_retrofit(tmp_path):
    """AutoPeftModel loads a saved retrofit, and no residual model in its place."""
    model = scatter(retrofit.convert(tiny("llama")), only="hc_stack")
    get_peft_model(copy.deepcopy(model), lora()).save_pretrained(tmp_path / "unsaved")
    with pytest.raises(Exception, match=r"\(convert with manifold_hc.interop.retrofit first\)"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "unsaved")

    model.save_pretrained(tmp_path / "whole")
    tuned = get_peft_model(retrofit.load(tmp_path / "whole"), lora())
    tuned.save_pretrained(tmp_path / "peft")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "peft")
    assert torch.equal(logits(again.eval()), logits(model))


def test_peft_comes_after_the_conversion():
    model = get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match=r"get_peft_model\(mhc.convert\(model\), ...\)"):
        retrofit.convert(model)
    with pytest.raises(
        ConfigError, match=r"but model.layers.0.self_attn.q_proj is a layer of PEFT; write get_peft"
    ):
        retrofit.convert(model.base_model.model)
    merged = retrofit.convert(model.merge_and_unload())
    assert logits(merged).shape == (2, 9, 64)
