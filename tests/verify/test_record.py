"""The recorder sees a transformers model as it runs, and leaves it as it was."""

import doctest
import warnings

import pytest
import torch

from manifold_hc.errors import ConfigError
from manifold_hc.interop.layouts import LAYOUTS
from manifold_hc.stack import Stack
from manifold_hc.verify import Widened, compare, record
from manifold_hc.verify.recorded import Recording

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture(scope="module")
def model():
    with warnings.catch_warnings(action="ignore"):
        from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

        config = DeepseekV4Config(
            hidden_size=16,
            num_hidden_layers=2,
            vocab_size=32,
            n_routed_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=8,
            num_attention_heads=2,
            head_dim=8,
            q_lora_rank=8,
            o_lora_rank=8,
            o_groups=2,
            index_n_heads=2,
            index_head_dim=8,
        )
        torch.manual_seed(0)
        model = DeepseekV4ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("fn", "base")):
                parameter.normal_(0, 1)
    return model


def stack_of(model):
    layout = LAYOUTS["transformers"]
    config = layout.config(4)
    named = {k: v for k, v in model.state_dict().items() if "_hc." in k or "hc_head" in k}
    stack = Stack(16, config, 4)
    stack.load_state_dict(layout.to_native(named, config))
    return stack


@pytest.mark.filterwarnings("ignore")
def test_a_model_agrees_with_its_own_weights(model):
    stack = stack_of(model)
    for float64, dtype in ((True, torch.float64), (False, torch.float32)):
        tensors = record(model, TOKENS, float64=float64)
        assert tensors["sublayers.3.new"].dtype is dtype
        assert torch.equal(tensors["sublayers.3.new"], tensors["exit.x"])
        found = compare(stack, Recording(tensors, stack, "model"))
        assert found.ok, found.diagnosis
        assert found.precision == str(dtype).removeprefix("torch.")
        assert len(found.compared) == 4 * 3 + 1


@pytest.mark.filterwarnings("ignore")
def test_the_model_is_left_as_it_was(model):
    with torch.no_grad():
        before = model(TOKENS).logits
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    record(model, TOKENS)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype is state[name].dtype
        assert torch.equal(tensor, state[name])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, before)


@pytest.mark.filterwarnings("ignore")
def test_the_model_is_left_as_it_was_after_an_error(model):
    with pytest.raises(IndexError):
        record(model, torch.tensor([[99]]))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.dtype is torch.float32 for p in model.parameters())


@pytest.mark.filterwarnings("ignore")
def test_a_change_of_its_own_code_is_seen(model, monkeypatch):
    """The write of the decoder layer is part of the recording."""
    stack, matmul = stack_of(model), torch.matmul

    def untransposed(first, second, **options):
        is_comb = first.shape[-2:] == (4, 4) and second.shape[-2:] == (4, 16)
        return matmul(first.transpose(-1, -2) if is_comb else first, second, **options)

    monkeypatch.setattr(torch, "matmul", untransposed)
    found = compare(stack, Recording(record(model, TOKENS), stack, "model"))
    assert found.diagnosis.sentences[0].startswith("res is mixed in the other direction")
    assert "fits all 4 sublayers and the exit" in found.diagnosis.sentences[0]


@pytest.mark.filterwarnings("ignore")
def test_one_weight_of_the_running_model_is_found(model):
    stack = stack_of(model)
    with torch.no_grad():
        model.model.layers[1].attn_hc.scale.mul_(0.01)
        stack.load_state_dict(stack_of(model).state_dict())
        model.model.layers[1].attn_hc.fn[1, 7] += 1e-3
    found = compare(stack, Recording(record(model, TOKENS), stack, "model"))
    assert {one.index for one in found.differing} == {2}
    assert found.diagnosis.verdict == "weights"


def test_another_model_is_refused():
    with pytest.raises(ConfigError, match="Linear has 0 and 0"):
        record(torch.nn.Linear(2, 2), TOKENS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("documented", [record, Widened])
def test_examples_run(documented):
    finder = doctest.DocTestFinder(recurse=False)
    (example,) = finder.find(documented, "example", globs={"torch": torch})
    assert example.examples
    report = []
    failed, _ = doctest.DocTestRunner(verbose=False).run(example, out=report.append)
    assert not failed, "".join(report)


@pytest.mark.filterwarnings("ignore")
def test_a_model_in_bfloat16_is_recorded_in_float64(model):
    import copy

    narrow = copy.deepcopy(model).bfloat16()
    stack = stack_of(narrow)
    found = compare(stack, Recording(record(narrow, TOKENS), stack, "model"))
    assert found.ok, found.diagnosis
    assert found.precision == "float64"
    found = compare(stack, Recording(record(narrow, TOKENS, float64=False), stack, "model"))
    assert found.ok, found.diagnosis
    assert found.precision == "bfloat16"
