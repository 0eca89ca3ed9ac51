"""Layouts of connection tensors: exact round trips, equality with their libraries, strictness."""

import doctest
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import manifold_hc as mhc
from manifold_hc.errors import CheckpointError
from manifold_hc.interop.layouts import LAYOUTS, Layout, convert, open_checkpoint
from tests.interop import peer_equations
from tests.interop.layout_models import filled, random_stack

every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
every_n = pytest.mark.parametrize("n", [2, 3, 4])


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@every_layout
@every_n
def test_round_trips_keep_every_bit(layout, n):
    native = dict(random_stack(layout, n).state_dict())
    tensors = layout.from_native(native)
    assert equal(layout.to_native(tensors), native)
    theirs = {name: torch.randn_like(tensor) for name, tensor in tensors.items()}
    assert equal(layout.from_native(layout.to_native(theirs)), theirs)


@every_layout
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_are_kept(layout, dtype):
    native = {name: t.to(dtype) for name, t in random_stack(layout).state_dict().items()}
    back = layout.to_native(layout.from_native(native))
    assert equal(back, native)
    assert {tensor.dtype for tensor in back.values()} == {dtype}


def test_entries_of_the_matrix_by_hand():
    """Liger's column of res[o, i] is the row of DeepSeek's comb[i, o]."""
    native = dict(random_stack(LAYOUTS["liger"], n=3).state_dict())
    tensors = LAYOUTS["liger"].from_native(native)
    phi, rows = tensors["1.phi"], native["connections.1.maps.phi"]
    for o in range(3):
        for i in range(3):
            assert torch.equal(phi[:, 6 + 3 * o + i], rows[6 + 3 * i + o])
    assert torch.equal(phi[:, :6], rows[:6].mT)
    assert tensors["1.alpha_post"] == native["connections.1.maps.alpha"][1]


def test_a_norm_weight_is_folded_into_phi():
    layout = LAYOUTS["tile_kernels"]
    tensors = layout.from_native(random_stack(layout).state_dict())
    weight = tensors["sublayers.2.norm_weight"] = torch.randn(20)
    native = layout.to_native(tensors)
    assert torch.equal(native["connections.2.maps.phi"], tensors["sublayers.2.fn"] * weight)
    assert torch.equal(native["connections.1.maps.phi"], tensors["sublayers.1.fn"])
    tensors["sublayers.2.norm_weight"] = torch.ones(5)
    with pytest.raises(CheckpointError, match=r"2\.norm_weight is \[5\], not \[20\]"):
        layout.to_native(tensors)


@pytest.mark.parametrize("name", ["megatron", "megatron_dev", "torchtitan"])
@every_n
def test_equations_of_libraries_that_are_not_installed(name, n):
    layout, library = LAYOUTS[name], getattr(peer_equations, name)
    changes = {"hc_eps": 0.0} if name == "torchtitan" else {}
    stack = random_stack(layout, n, sublayers=2, **changes).double()
    tensors = layout.from_native(stack.state_dict())
    stems = [layout.names.prefix + stem for stem in layout.names.sublayers]
    x = torch.randn(7, n, 5, dtype=torch.float64)
    options = {"eps": 0.0} if name == "torchtitan" else {}
    expected = actual = x
    for stem, connection in zip(stems, stack.connections, strict=True):
        values = lambda field, stem=stem: tensors[stem.format(layer=0, field=field)]  # noqa: E731
        expected = library(expected, values, torch.sin, **options)
        actual = connection(actual, torch.sin)
    tolerance = 1e-12 if name == "torchtitan" else 1e-5  # epsilon outside the root
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    if n == 2:
        return  # both orders converge to the same matrix
    order = {"sinkhorn": "sinkhorn_columns", "sinkhorn_columns": "sinkhorn"}
    other = mhc.Stack(5, replace(stack.config, constraint=order[stack.config.constraint]), 2)
    other.double().load_state_dict(stack.state_dict())
    first, turned = (one.connections[0](x, torch.sin) for one in (stack, other))
    assert (first - turned).abs().max() > 1e-4


def test_torchtitans_own_epsilon_is_not_representable():
    """The stated difference: no epsilon after the softmax."""
    layout = LAYOUTS["torchtitan"]
    stack = filled(mhc.Stack(5, layout.config(4), 2), std=3).double()
    tensors = layout.from_native(stack.state_dict())
    x = torch.randn(200, 4, 5, dtype=torch.float64)
    theirs = peer_equations.torchtitan(
        x, lambda field: tensors[f"layers.0.hc_attn_pre.{field}"], torch.sin
    )
    assert (stack.connections[0](x, torch.sin) - theirs).abs().max() > 1e-2


@pytest.mark.skipif(
    peer_equations.tile_kernels_reference() is None, reason="tile-kernels is not installed"
)
@every_n
def test_tile_kernels_own_reference(n):
    peer, layout = peer_equations.tile_kernels_reference(), LAYOUTS["tile_kernels"]
    stack = random_stack(layout, n, sublayers=2)
    tensors = layout.from_native(stack.state_dict())
    tensors["sublayers.1.norm_weight"] = torch.rand(5 * n) + 0.5
    stack.load_state_dict(layout.to_native(tensors))
    x = torch.randn(1, 7, n, 5)
    expected = x
    for sublayer in range(2):
        fn, scale, base, weight = (
            tensors.get(f"sublayers.{sublayer}.{part}")
            for part in ("fn", "scale", "base", "norm_weight")
        )
        mixes = peer.mhc_pre_norm_fn_ref(expected, fn, weight, 1e-6)
        pre, post, comb = peer.mhc_pre_split_mixes_ref(mixes, scale, base, n, 2.0, 1e-6)
        comb = peer.sinkhorn_normalize_ref(comb, repeat=10)
        y = torch.sin((expected * pre).sum(-2))
        mixed = torch.einsum("abmn,abmc->abnc", comb, expected)  # mhc_post_ref without its bfloat16
        expected = y.unsqueeze(-2) * post + mixed
    actual = stack.connections[1](stack.connections[0](x, torch.sin), torch.sin)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("triton", "liger_kernel")),
    reason="triton or liger-kernel is not installed",
)
def test_ligers_own_module():
    """In a process of its own: triton decides at its first import whether it interprets."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", CASES],
        env=dict(os.environ, TRITON_INTERPRET="1"),
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


CASES = Path(__file__).with_name("liger_cases.py")


UNUSUAL = {"hc_sinkhorn_iters": 3, "hc_eps": 1e-3, "rms_norm_eps": 3e-3}
"""Few iterations and large epsilons, so that wrong ones show."""


@pytest.fixture(scope="module")
def deepseek():
    """A tiny causal DeepSeek-V4 of transformers with random connections."""
    import warnings

    with warnings.catch_warnings(action="ignore"):
        from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
    config = DeepseekV4Config(
        vocab_size=32,
        hidden_size=16,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=8,
        q_lora_rank=8,
        o_groups=1,
        o_lora_rank=8,
        n_routed_experts=2,
        num_experts_per_tok=1,
        layer_types=["sliding_attention"] * 2,
        mlp_layer_types=["moe"] * 2,
        hc_mult=3,
        **UNUSUAL,
    )
    torch.manual_seed(0)
    model = DeepseekV4ForCausalLM(config).eval()
    connections = [
        module for name, module in model.named_modules() if name.endswith(("_hc", "_head"))
    ]
    for module in connections:
        if "Hyper" in type(module).__name__:
            filled(module)
    return model


@pytest.mark.parametrize("name", ["transformers", "deepseek_v4"])
def test_transformers_loads_what_is_written(deepseek, tmp_path, name):
    saved = tmp_path / "saved"
    deepseek.save_pretrained(saved)
    source = open_checkpoint(saved)
    assert (source.layout.name, source.config.streams, source.config.iterations) == (
        "deepseek_v4",
        3,
        3,
    )
    assert source.assumed == ()
    assert len(source.used) + len(source.other) == len(source.files)
    done = convert(source, LAYOUTS[name])
    assert done.kept == source.other
    assert done.left_out == ()
    folder = write(tmp_path / name, dict(done.tensors()), done.metadata, deepseek.config.to_dict())
    again, report = type(deepseek).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert equal(again.state_dict(), deepseek.state_dict())
    assert equal(LAYOUTS["transformers"].to_native(again.state_dict()), source.native)


def write(folder, tensors, metadata=None, config=None):
    folder.mkdir()
    save_file(
        {name: t.contiguous() for name, t in tensors.items()},
        folder / "model.safetensors",
        metadata,
    )
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, default=str))
    return folder


def test_a_stack_from_a_file_computes_what_deepseek_v4_does(deepseek, tmp_path):
    deepseek.save_pretrained(tmp_path)
    require_equal(open_checkpoint(tmp_path).stack(), deepseek.model.layers, deepseek.model.hc_head)


def test_a_stack_from_a_file_computes_what_glm5_does(tmp_path):
    from transformers.models.glm5_next.configuration_glm5_next import Glm5NextTextConfig
    from transformers.models.glm5_next.modeling_glm5_next import Glm5NextTextModel

    config = Glm5NextTextConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=2,
        num_experts_per_tok=1,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=0,
        v_head_dim=8,
        index_n_heads=2,
        index_head_dim=8,
        linear_head_dim=8,
        linear_num_heads=2,
        layer_types=["linear_attention", "indexed_attention"],
        hc_mult=3,
        pad_token_id=None,
        **UNUSUAL,
    )
    model = filled(Glm5NextTextModel(config), std=0.5).eval()
    model.save_pretrained(tmp_path)
    source = open_checkpoint(tmp_path)
    assert (source.config.numerics, source.config.exit_rule) == ("glm5", "mean")
    require_equal(source.stack(), model.layers, lambda x: x.mean(-2))


def require_equal(stack, layers, head):
    """The connections and the exit compute what the modules of transformers do."""
    x = torch.randn(1, 5, 3, 16)
    modules = [module for layer in layers for module in (layer.attn_hc, layer.ffn_hc)]
    for connection, module in zip(stack.connections, modules, strict=True):
        post, comb, u = module(x)
        theirs = post.unsqueeze(-1) * torch.sin(u).unsqueeze(-2) + comb.mT @ x
        torch.testing.assert_close(connection(x, torch.sin), theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stack.collapse(x), head(x), rtol=1e-5, atol=1e-5)


def damaged(layout):
    """Tensors with one missing, one extra, one transposed and one renamed; the four messages."""
    tensors = layout.from_native(random_stack(layout).state_dict())
    names = layout.names
    fields = {field.parameter: field for field in names.fields if field.entry in (None, 1)}

    def name(sublayer, parameter):
        layer, index = divmod(sublayer, len(names.sublayers))
        stem = names.sublayers[index]
        return names.prefix + stem.format(layer=layer, field=fields[parameter].name)

    missing, extra, renamed = name(1, "alpha"), name(9, "bias"), name(2, "bias")
    transposed = name(3, "phi")
    tensors[extra] = torch.zeros(24)
    del tensors[missing]
    tensors[transposed] = tensors[transposed].mT
    tensors[f"{renamed}s"] = tensors.pop(renamed)
    return tensors, (
        rf"{missing} \[.*\] is missing",
        rf"{transposed} is \[\d+, \d+\], the transpose of \[\d+, \d+\]",
        rf"{renamed} \[24\] is missing \(did you mean {renamed}s\?\)",
    )


@every_layout
def test_every_damaged_tensor_is_named(layout, unchecked):
    tensors, messages = damaged(layout)
    with pytest.raises(CheckpointError) as caught:
        layout.to_native(tensors)
    for message in messages:
        caught.match(message)


@every_layout
def test_a_tensor_without_a_place_is_named(layout, unchecked):
    tensors = layout.from_native(random_stack(layout).state_dict())
    first = next(iter(tensors))
    with pytest.raises(CheckpointError, match=r"other.* does not begin with"):
        layout.to_native(tensors | {f"other.{first}": tensors[first]})


@every_layout
def test_parameters_without_a_place_are_named(layout, unchecked):
    native = dict(random_stack(layout).state_dict())
    with pytest.raises(CheckpointError, match=r"has no place for connections\.0\.maps\.psi"):
        layout.from_native(native | {"connections.0.maps.psi": torch.ones(3)})
    if layout.names.exit is None:
        with pytest.raises(CheckpointError, match=r"no place for exit\.phi"):
            layout.from_native(native | {"exit.phi": torch.ones(4, 20)})


@pytest.mark.parametrize("documented", [Layout, open_checkpoint], ids=["Layout", "open_checkpoint"])
def test_examples_run(documented):
    examples = doctest.DocTestFinder().find(documented, globs={})
    report = []
    for example in examples:
        assert not doctest.DocTestRunner(verbose=False).run(example, out=report.append).failed, (
            report
        )
    assert sum(len(example.examples) for example in examples) > 5
