"""Streams between the blocks, precision, checkpointing, copies, and refused models."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch

import manifold_hc as mhc
from manifold_hc import functional
from manifold_hc.errors import ConfigError, ShapeError
from manifold_hc.interop import retrofit

pytest.importorskip("transformers")

from tests.interop.tiny_models import (
    SIZES,
    logits,
    relative_error,
    scatter,
    tiny,
    tokens,
)


def test_streams_are_carried_through_the_whole_stack(monkeypatch):
    """One expand, one collapse, and the streams that the reference computes between them."""
    model = scatter(retrofit.convert(tiny("llama")), only="hc_stack")
    calls = []
    for name in ("expand", "collapse"):
        made = getattr(functional, name)

        def counted(*args, made=made, name=name, **options):
            calls.append(name)
            return made(*args, **options)

        monkeypatch.setattr(functional, name, counted)
    between = []
    for layer in model.model.layers[1:]:
        layer.register_forward_pre_hook(lambda layer, args: between.append(args[0]))
    wanted = logits(model)
    assert calls == ["expand", "collapse"]
    assert [tuple(x.shape) for x in between] == [(2, 9, 4, 32)] * 2
    for x in between:
        assert (x - x.mean(-2, keepdim=True)).abs().max() > 0.01 * x.abs().max()

    with torch.no_grad():
        x = model.model.embed_tokens(tokens()).unsqueeze(-2).repeat(1, 1, 4, 1)
        positions = torch.arange(9).unsqueeze(0)
        rotations = model.model.rotary_emb(x, positions)
        for index, layer in enumerate(model.model.layers):
            for sublayer in (0, 1):
                maps = layer.hc_stack.connections[2 * index + sublayer].maps
                pre, post, res = functional.coefficients(
                    x, maps.phi, maps.alpha, maps.bias, backend="reference"
                )
                u = torch.einsum("...i,...ic->...c", pre, x)
                if sublayer == 0:
                    u = layer.input_layernorm(u)
                    y, _ = layer.self_attn(u, position_embeddings=rotations, attention_mask=None)
                else:
                    y = layer.mlp(layer.post_attention_layernorm(u))
                x = torch.einsum("...oi,...ic->...oc", res, x) + post[..., None] * y[..., None, :]
        by_hand = model.lm_head(model.model.norm(x.mean(-2)))
    assert relative_error(wanted, by_hand) < 1e-5


def test_hidden_states_are_the_streams():
    plain = tiny("mistral", attn_implementation="eager")
    shapes = [tuple(h.shape) for h in plain(tokens(), output_hidden_states=True).hidden_states]
    assert shapes == [(2, 9, 32)] * 4
    model = retrofit.convert(plain)  # transformers' own hooks on the layers do not hinder
    output = model(tokens(), output_hidden_states=True, output_attentions=True)
    shapes = [tuple(h.shape) for h in output.hidden_states]
    assert shapes == [(2, 9, 32), (2, 9, 4, 32), (2, 9, 4, 32), (2, 9, 32)]
    assert torch.equal(output.hidden_states[-1], model.model(tokens()).last_hidden_state)
    assert len(output.attentions) == 3


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations(attention):
    plain = tiny("qwen2", attn_implementation=attention)
    wanted = logits(plain)
    assert relative_error(logits(retrofit.convert(plain)), wanted) <= 1e-5


def test_connections_stay_in_float32():
    model = scatter(retrofit.convert(tiny("llama")), only="hc_stack")
    wanted = {n: p.clone() for n, p in model.named_parameters() if "hc_stack" in n}
    model.to(torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    for name, parameter in wanted.items():
        assert torch.equal(model.get_parameter(name), parameter)
    output = model(tokens(), labels=tokens())
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    assert all(model.get_parameter(name).grad is not None for name in wanted if "bias" in name)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("trainable", ["all", "connections"])
def test_activation_checkpointing_gives_the_same_gradients(reentrant, trainable):
    model = scatter(retrofit.convert(tiny("gpt2"), trainable=trainable), only="hc_stack").train()
    model.config.use_cache = False
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    other = copy.deepcopy(model)
    other.activation_checkpointing_enable(
        activation_checkpointing_kwargs={"use_reentrant": reentrant}
    )
    model(tokens(), labels=tokens()).loss.backward()
    other(tokens(), labels=tokens()).loss.backward()
    count = 0
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None) == (not one.requires_grad)
        if one.grad is not None:
            torch.testing.assert_close(two.grad, one.grad, rtol=1e-5, atol=1e-7)
            count += 1
    assert count == (18 if trainable == "connections" else len(list(model.parameters())))


@pytest.mark.usefixtures("unchecked")
def test_trainable_connections():
    model = retrofit.convert(tiny("gemma"), trainable="connections")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".hc_stack." in name}
    assert len(trained) == 2 * 3 * 3  # sublayers, and phi, alpha, bias of each
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(ConfigError, match="trainable must be all or connections"):
        retrofit.convert(tiny("gemma"), trainable="maps")


def test_copies_and_pickles():
    model = scatter(retrofit.convert(tiny("olmo")))
    wanted = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), wanted)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(again), wanted)
    assert type(again) is type(model)
    assert type(again.config) is type(model.config)


def test_the_configuration_of_other_models_is_left_alone():
    plain = tiny("llama")
    other = type(plain)(plain.config)
    model = retrofit.convert(plain)
    assert type(other.config).__name__ == "LlamaConfig"
    assert not hasattr(other.config, "hc_retrofit")
    assert model.config is model.model.config is model.model.layers[0].self_attn.config
    assert type(model).__name__ == "LlamaForCausalLM"
    assert isinstance(model, type(other))
    assert model.config.model_type == "llama"


@pytest.mark.slow
def test_compiles_as_one_graph():
    """In a process of its own, because Dynamo cannot trace the shape checks of the tests."""
    script = (
        "import torch; from manifold_hc.interop import retrofit;"
        "from tests.interop.tiny_models import *;"
        "model = retrofit.convert(tiny('llama', num_hidden_layers=2));"
        "compiled = torch.compile(model, backend='eager', fullgraph=True);"
        "assert relative_error(logits(compiled, use_cache=False), logits(model)) <= 1e-5"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda model: model.model.layers[1].register_forward_hook(lambda *args: None),
            r"model.layers.1 must have no hooks but has .*lambda",
        ),
        (
            lambda model: setattr(model.model.layers[2], "forward", lambda x: x),
            r"model.layers.2 must run the forward of LlamaDecoderLayer but has one of its own",
        ),
        (
            lambda model: setattr(model.model.layers[0], "hc_stack", 1),
            r"model.layers.0 must not have an attribute hc_stack",
        ),
        (
            lambda model: model.model.layers.__setitem__(1, model.model.layers[0]),
            r"every block must be a module of its own",
        ),
        (
            lambda model: delattr(model.model.layers[2], "mlp"),
            r"model.layers.2 must have the module 'mlp'.*has self_attn, input_layernorm",
        ),
        (lambda model: retrofit.convert(model), r"is converted already"),
        (lambda model: setattr(model.config, "model_type", "odd"), r"model_type is 'odd'"),
    ],
)
def test_refused_models_are_unchanged(change, message):
    model = tiny("llama")
    change(model)
    before = {name: (type(m), vars(m).keys()) for name, m in model.named_modules()}
    with pytest.raises(ConfigError, match=message):
        retrofit.convert(model, trainable="connections")
    after = {name: (type(m), vars(m).keys()) for name, m in model.named_modules()}
    assert after == before
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config": mhc.ConnectionConfig(single_pass=True)}, "single_pass must be off"),
        ({"config": mhc.ConnectionConfig(numerics="deepseek_v41")}, "single_pass must be off"),
        ({"kind": "hc", "config": mhc.ConnectionConfig()}, "must be left out if config is given"),
        ({"config": "mhc"}, "config must be a ConnectionConfig"),
        ({"kind": "mHC"}, "kind: must be residual, hc or mhc"),
        ({"streams": 0}, "streams: must be at least 1"),
        ({"blocks": "model.layers"}, "must be left out for a model of transformers"),
        ({"channels": 32}, "must be left out for a model of transformers"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_refused_arguments(options, message):
    with pytest.raises(ConfigError, match=message):
        retrofit.convert(tiny("llama"), **options)


@pytest.mark.usefixtures("unchecked")
def test_wrapped_models_are_refused():
    model = tiny("llama")
    with pytest.raises(ConfigError, match="must not be compiled yet"):
        retrofit.convert(torch.compile(model, backend="eager"))
    with pytest.raises(ConfigError, match=r"must be a torch.nn.Module but is str"):
        retrofit.convert("llama")


def test_a_block_names_its_arguments():
    layer = retrofit.convert(tiny("llama")).model.layers[1]
    assert layer.argument_names[:2] == ("hidden_states", "attention_mask")
    with pytest.raises(ShapeError, match="takes at most 6 arguments"):
        layer(*range(9))
    with pytest.raises(ConfigError, match=r"must run in order.* got \[1, 2, 32\] with n = 4"):
        layer(torch.zeros(1, 2, SIZES["hidden_size"]))
