"""Checkpoints of others: layout, sizes and hyperparameters, and conversion between layouts."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import save_file

import manifold_hc as mhc
from manifold_hc.errors import CheckpointError, ConfigError, RunFolderError
from manifold_hc.interop.layouts import LAYOUTS, convert, open_checkpoint, settings
from manifold_hc.numerics import PRESETS
from tests.interop.layout_models import branches, filled, random_stack

pytestmark = pytest.mark.usefixtures("unchecked")

V4, TRANSFORMERS, MANIFOLD = (LAYOUTS[name] for name in ("deepseek_v4", "transformers", "manifold"))


def saved(folder, tensors, metadata=None, **config):
    """A folder with the tensors and a config.json."""
    whole = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    save_file(whole, folder / "model.safetensors", metadata)
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def deepseek(n=4, layers=2, **changes):
    return V4.from_native(random_stack(V4, n, sublayers=2 * layers, **changes).state_dict())


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_is_found_by_the_names(tmp_path, name):
    stack = random_stack(LAYOUTS[name], n=3)
    tensors = LAYOUTS[name].from_native(stack.state_dict())
    saved(tmp_path, tensors | {"embed.weight": torch.ones(2, 3)})
    if name == "megatron":  # without a head, its names are those of the other Megatron
        with pytest.raises(CheckpointError, match=r"may be any of megatron, megatron_dev; name"):
            open_checkpoint(tmp_path)
    found = open_checkpoint(tmp_path, name if name == "megatron" else None)
    assert found.layout.name == name
    assert found.config == LAYOUTS[name].config(3) or found.config.exit == "learned"
    assert (found.channels, found.sublayers, found.config.streams) == (5, 4, 3)
    assert set(found.used) == tensors.keys()
    assert found.other == ("embed.weight",)
    assert found.assumed == ("iterations", "norm_eps", "hc_eps")
    h, work = torch.randn(3, 5), branches(4)
    assert torch.equal(found.stack()(h, work), stack(h, work))


def test_an_unknown_layout_names_the_known_ones(tmp_path):
    saved(tmp_path, {"layers.0.weight": torch.ones(3)})
    with pytest.raises(CheckpointError, match=r"no connections in a known layout.*hc_attn_fn"):
        open_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="must be one of manifold, deepseek_v4,"):
        open_checkpoint(tmp_path, "megaton")


def test_hyperparameters_of_config_json(tmp_path):
    saved(
        tmp_path,
        deepseek(),
        hc_mult=4,
        hc_sinkhorn_iters=12,
        hc_eps=1e-5,
        rms_norm_eps=1e-4,
        num_hidden_layers=2,
    )
    found = open_checkpoint(tmp_path)
    config = found.config
    assert (config.iterations, config.hc_eps, config.norm_eps) == (12, 1e-5, 1e-4)
    assert found.assumed == ()
    equal = {"iterations": 12, "hc_eps": None, "norm_eps": 1e-4, "streams": 4}
    assert open_checkpoint(tmp_path, overrides=equal).config == config


CONTRADICTIONS = (
    ("iterations", 12, 5),
    ("hc_eps", 1e-5, 1e-3),
    ("norm_eps", 1e-4, 1e-6),
    ("exit", "learned", "mean"),
    ("constraint", "sinkhorn", "sinkhorn_columns"),
    ("single_pass", False, True),
)
"""Field, value in the files and another value; config.json has the first three."""


@pytest.mark.parametrize(("name", "written", "given"), CONTRADICTIONS)
def test_a_value_that_contradicts_the_files_is_refused(tmp_path, name, written, given):
    saved(tmp_path, deepseek(), hc_sinkhorn_iters=12, hc_eps=1e-5, rms_norm_eps=1e-4)
    source = open_checkpoint(tmp_path)
    message = f"{name} is {written!r} in the files, not {given!r}"
    if name in ("iterations", "hc_eps", "norm_eps"):
        with pytest.raises(ConfigError, match=message):
            open_checkpoint(tmp_path, overrides={name: given})
    done = convert(source, TRANSFORMERS)
    saved(tmp_path, done.connections, done.metadata)
    with pytest.raises(ConfigError, match=message):
        open_checkpoint(tmp_path, overrides={name: given})
    assert open_checkpoint(tmp_path, overrides={name: written}).config == source.config


def test_equal_values_and_those_of_no_file_are_taken(tmp_path):
    """The paper has no hc_eps, which is 0."""
    stack = random_stack(MANIFOLD)
    saved(tmp_path, stack.state_dict(), metadata_of(stack.config, 5))
    assert open_checkpoint(tmp_path, overrides={"hc_eps": 0.0}).config == stack.config
    chosen = open_checkpoint(tmp_path, overrides={"backend": "reference"}).config
    assert chosen == replace(stack.config, backend="reference")


def test_config_json_knows_of_layers_and_streams_that_are_not_there(tmp_path):
    saved(tmp_path, deepseek(), num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"6 problems: layers\.2\.hc_attn_base .*missing"):
        open_checkpoint(tmp_path)
    saved(tmp_path, deepseek(), num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"6 problems: layers\.1\.hc_\w+ has no place"):
        open_checkpoint(tmp_path)
    saved(tmp_path, deepseek(), hc_mult=2)
    with pytest.raises(CheckpointError, match=r"must have connections of 2 streams, .* those of 4"):
        open_checkpoint(tmp_path)


HOSTILE = (
    {"hc_mult": 10**9},
    {"hc_mult": "4"},
    {"num_hidden_layers": 10**9},
    {"hc_sinkhorn_iters": 10**9},
    {"hc_eps": "x"},
    {"rms_norm_eps": -1.0},
    {"text_config": 3},
    {"connection": 3},
)


@pytest.mark.parametrize("config", HOSTILE, ids=str)
def test_values_of_config_json_are_checked_before_a_model_is_built(tmp_path, config):
    saved(tmp_path, deepseek(), **config)
    with pytest.raises((CheckpointError, ConfigError, RunFolderError)) as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_layer_number_alone_makes_no_model(tmp_path):
    saved(tmp_path, deepseek() | {"layers.99999999.hc_attn_base": torch.ones(24)})
    with pytest.raises(CheckpointError, match=r"1 problem: layers\.99999999\.\w+ has no place"):
        open_checkpoint(tmp_path)


def test_exits(tmp_path):
    """V4 has a head; GLM-5 takes the mean; V4.1 weights by the last pre."""
    headless = {name: t for name, t in deepseek().items() if "head" not in name}
    saved(tmp_path, headless)
    with pytest.raises(CheckpointError, match=r"3 problems: hc_head_\w+ .*missing"):
        open_checkpoint(tmp_path)
    single = open_checkpoint(tmp_path, overrides={"numerics": "deepseek_v41"}).config
    assert (single.exit_rule, single.is_single_pass) == ("pre", True)
    assert open_checkpoint(tmp_path, overrides={"single_pass": True}).config.exit_rule == "pre"
    saved(tmp_path, headless, model_type="glm5_next", rms_norm_eps=1e-5)
    glm = open_checkpoint(tmp_path).config
    assert (glm.numerics, glm.exit_rule, glm.norm_eps) == ("glm5", "mean", 1e-5)
    saved(tmp_path, deepseek(), model_type="glm5_next")
    with pytest.raises(CheckpointError, match=r"hc_head_fn has no place"):
        open_checkpoint(tmp_path)


def test_multi_token_prediction_is_no_sublayer(tmp_path):
    tensors = deepseek()
    more = {f"mtp.0.{name.split('.')[-1]}": t for name, t in tensors.items()}
    saved(tmp_path, tensors | more)
    found = open_checkpoint(tmp_path)
    assert set(found.other) == more.keys()
    assert len(found.used) == len(tensors)


def test_metadata_holds_the_whole_configuration(tmp_path):
    stack = random_stack(V4, 3, iterations=9, hc_eps=0.0, norm_eps=1e-3)
    saved(tmp_path, V4.from_native(stack.state_dict()))
    values = {"iterations": 9, "hc_eps": 0.0, "norm_eps": 1e-3}
    done = convert(open_checkpoint(tmp_path, overrides=values), TRANSFORMERS)
    saved(tmp_path, done.connections, done.metadata)
    found = open_checkpoint(tmp_path)
    assert (found.layout, found.config, found.assumed) == (TRANSFORMERS, stack.config, ())
    for entry in ("{", "[]", '{"layout": "liger", "channels": 5, "connection": {"streem": 4}}'):
        saved(tmp_path, done.connections, {"manifold_hc": entry})
        with pytest.raises(CheckpointError, match=r"damaged metadata|another configuration"):
            open_checkpoint(tmp_path)


def test_a_field_that_does_not_exist_has_a_hint(tmp_path):
    saved(tmp_path, deepseek())
    with pytest.raises(ConfigError, match=r"iteration: .*did you mean iterations"):
        open_checkpoint(tmp_path, overrides={"iteration": 3})


def test_a_run_exported_for_transformers(tmp_path):
    """Its config.json holds the connections with the keys of transformers."""
    stack = random_stack(MANIFOLD, 3, iterations=6)
    config = {"model_type": "manifold_hc", "connection": asdict(stack.config)}
    tensors = {f"decoder.stack.{name}": tensor for name, tensor in stack.state_dict().items()}
    found = open_checkpoint(saved(tmp_path, tensors, **config))
    assert (found.config, found.prefix, found.assumed) == (stack.config, "decoder.stack.", ())


def converted(stack, each=2):
    """Names of a converted model: every block has its part, with the numbers of the whole stack."""
    named = {}
    for name, tensor in stack.state_dict().items():
        last = len(stack.connections) - 1
        sublayer = last if name.startswith("exit.") else int(name.split(".")[1])
        named[f"model.layers.{sublayer // each}.hc_stack.{name}"] = tensor
    return named


@pytest.mark.parametrize("record", ["config.json", "retrofit.json"])
def test_a_converted_model_and_its_adapter(tmp_path, record):
    stack = random_stack(MANIFOLD, 3, sublayers=6, iterations=6, exit="learned")
    others = {"model.layers.0.mlp.weight": torch.ones(5, 5)}
    saved(tmp_path, converted(stack) | others)
    values = {"connection": {"kind": "mhc", "streams": 3, "iterations": 6, "exit": "learned"}}
    if record == "config.json":
        values["model_type"] = "manifold_hc_retrofit"
        values["num_hidden_layers"] = 3
    (tmp_path / record).write_text(json.dumps(values))
    for path in (tmp_path, tmp_path / "model.safetensors"):
        found = open_checkpoint(path)
        assert (found.sublayers, found.assumed, found.other) == (6, (), tuple(others))
        assert (found.config.iterations, found.config.exit_rule) == (6, "learned")
        h, work = torch.randn(3, 5), branches(6)
        assert torch.equal(found.stack()(h, work), stack(h, work))
    assert convert(found, MANIFOLD).connections.keys() == stack.state_dict().keys()


def test_two_tensors_of_one_place_are_named(tmp_path):
    """Two converted stacks, such as those of an encoder and a decoder."""
    tensors = converted(random_stack(MANIFOLD))
    name = "encoder.layers.0.hc_stack.connections.1.maps.bias"
    saved(tmp_path, tensors | {name: torch.ones(24)})
    message = (
        r"1 problem: \S+connections\.1\.maps\.bias has the place of \S+connections\.1\.maps\.bias"
    )
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("kind", ["hc", "static", "permutation"])
def test_other_connections_of_this_package(tmp_path, kind):
    """HC, static maps and other constraints have a place in our own layout alone."""
    config = {
        "hc": mhc.ConnectionConfig(kind="hc"),
        "static": mhc.ConnectionConfig(dynamic=False),
        "permutation": mhc.ConnectionConfig(streams=3, constraint="permutation"),
    }[kind]
    stack = filled(mhc.Stack(5, config, 2))
    source = open_checkpoint(saved(tmp_path, stack.state_dict(), metadata_of(config, 5)))
    assert source.config == config
    assert all(map(torch.equal, source.stack().parameters(), stack.parameters()))
    with pytest.raises(CheckpointError, match=r"takes dynamic mHC|n\*n logits"):
        convert(source, V4, inexact=True)


def metadata_of(config, channels):
    return settings.metadata_of(MANIFOLD, config, channels)


def test_a_paper_model_becomes_a_deepseek_model_with_the_same_output(tmp_path):
    config = mhc.ConnectionConfig(exit="learned", streams=3)
    stack = filled(mhc.Stack(5, config, 4)).double()
    source = open_checkpoint(saved(tmp_path, stack.state_dict(), metadata_of(config, 5)))
    done = convert(source, V4)
    assert done.config.numerics == "deepseek_v4"
    note = "hc_eps is 0, not deepseek_v4's 1e-06: deepseek_v4 needs it to be set"
    assert note in done.notes
    theirs = mhc.Stack(5, done.config, 4).double()
    theirs.load_state_dict(V4.to_native(done.connections))
    h, work = torch.randn(6, 5).double(), [torch.sin] * 4
    torch.testing.assert_close(theirs(h, work), stack(h, work), rtol=1e-12, atol=1e-12)
    unturned = V4.from_native(source.native)
    theirs.load_state_dict(V4.to_native(unturned))
    assert (theirs(h, work) - stack(h, work)).abs().max() > 1e-3


def test_what_a_library_cannot_compute_is_refused_or_noted(tmp_path):
    source = open_checkpoint(saved(tmp_path, deepseek()))
    with pytest.raises(CheckpointError, match=r"constraint is sinkhorn_columns, not sinkhorn"):
        convert(source, LAYOUTS["megatron"])
    headless = {name: t for name, t in deepseek().items() if "head" not in name}
    (tmp_path / "41").mkdir()
    single = saved(tmp_path / "41", headless)
    source = open_checkpoint(single, overrides={"numerics": "deepseek_v41"})
    with pytest.raises(CheckpointError, match=r"its exit is learned, not pre"):
        convert(source, LAYOUTS["torchtitan"])
    done = convert(source, LAYOUTS["liger"], inexact=True)
    assert done.notes[:2] == (
        "its constraint is sinkhorn_columns, not sinkhorn",
        "its exit is mean or sum, not pre",
    )
    with_head = open_checkpoint(saved(tmp_path, deepseek()))
    done = convert(with_head, LAYOUTS["liger"], inexact=True)
    assert set(done.left_out) == {"hc_head_fn", "hc_head_base", "hc_head_scale"}
    assert set(LAYOUTS["liger"].to_native(done.connections)) == {
        name for name in with_head.native if not name.startswith("exit.")
    }


@pytest.mark.parametrize("name", ["liger", "megatron"])
def test_a_file_without_its_exit_is_read_again(tmp_path, name):
    source = open_checkpoint(saved(tmp_path, deepseek()))
    done = convert(source, LAYOUTS[name], inexact=True)
    assert "its exit is" in " ".join(done.notes)
    assert "the learned exit is left out: the metadata of the file says mean" in done.notes
    again = open_checkpoint(saved(tmp_path, done.connections, done.metadata))
    assert (again.config, again.config.exit_rule) == (done.config, "mean")
    assert set(again.native) == {one for one in source.native if not one.startswith("exit.")}
    with pytest.raises(CheckpointError, match=r"hc_head_fn \[4, 20\] is missing"):
        V4.to_native(V4.from_native(again.native))


@pytest.mark.parametrize("name", ["liger", "megatron"])
def test_a_learned_exit_without_its_tensors_is_named(tmp_path, name):
    layout = LAYOUTS[name]
    config = replace(layout.config(4), exit="learned")
    stack = random_stack(layout)
    metadata = settings.metadata_of(layout, config, 5)
    saved(tmp_path, layout.from_native(stack.state_dict()), metadata)
    message = rf"{name}: must hold exit\.phi, .* with exit learned but has no such tensors"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)
    saved(tmp_path, layout.from_native(stack.state_dict()))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path, name, {"exit": "learned"})


def test_every_epsilon_of_the_source_is_noted(tmp_path):
    source = open_checkpoint(saved(tmp_path, deepseek()))
    done = convert(source, LAYOUTS["megatron"], inexact=True)
    assert done.config.hc_eps is None
    note = "hc_eps is 1e-06, not megatron's 0: megatron has no setting for it"
    assert note in done.notes
    assert "its constraint is sinkhorn_columns, not sinkhorn" in done.notes


def test_epsilons_without_a_setting_are_noted(tmp_path):
    config = mhc.ConnectionConfig(constraint="sinkhorn_columns")
    stack = filled(mhc.Stack(5, config, 2))
    source = open_checkpoint(saved(tmp_path, stack.state_dict(), metadata_of(config, 5)))
    done = convert(source, LAYOUTS["megatron"])
    note = "norm_eps is 1e-20, not megatron's 1e-06: megatron has no setting for it"
    assert note in done.notes
    assert LAYOUTS["megatron"].difference in done.notes


def test_other_tensors_are_kept_in_the_family_and_never_dropped(tmp_path):
    others = {"layers.0.attn.wq.weight": torch.ones(2, 2), "norm.weight": torch.ones(5)}
    source = open_checkpoint(saved(tmp_path, deepseek() | others))
    done = convert(source, TRANSFORMERS)
    assert set(done.kept) == others.keys()
    assert "layers.0.attn_hc.fn" in done.connections  # with the prefix of the others
    with pytest.raises(ConfigError, match=r"2 tensors are no connections .*norm\.weight"):
        convert(source, LAYOUTS["torchtitan"])
    done = convert(source, LAYOUTS["torchtitan"], connections_only=True)
    assert (done.kept, set(done.left_out)) == ((), others.keys())


def test_rounding_is_noted(tmp_path):
    tensors = deepseek()
    narrow = {name: t.bfloat16() if name.endswith("fn") else t for name, t in tensors.items()}
    source = open_checkpoint(saved(tmp_path, narrow))
    done = convert(source, TRANSFORMERS)
    assert any("connections are bfloat16, float32" in note for note in done.notes)
    wide = convert(source, TRANSFORMERS, dtype=torch.float32)
    assert not any("rounded" in note or "connections are" in note for note in wide.notes)
    name = "layers.0.hc_attn_fn"
    stack = source.stack()
    assert torch.equal(stack.connections[0].maps.phi, narrow[name].float())
    rounded = convert(open_checkpoint(saved(tmp_path, tensors)), TRANSFORMERS, dtype=torch.float16)
    assert any("rounded from float32 to float16" in note for note in rounded.notes)


def test_connections_that_are_not_floating_point_are_refused(tmp_path):
    tensors = deepseek()
    name = "layers.1.hc_ffn_base"
    saved(tmp_path, tensors | {name: tensors[name].long()})
    with pytest.raises(CheckpointError, match=rf"1 problem: {name} is int64, not floating point"):
        open_checkpoint(tmp_path)


def test_values_that_are_not_finite_are_named(tmp_path):
    tensors = deepseek()
    assert open_checkpoint(saved(tmp_path, tensors)).not_finite() == []
    tensors["layers.1.hc_ffn_fn"][3, 2] = float("nan")
    tensors["hc_head_base"][1] = -float("inf")
    source = open_checkpoint(saved(tmp_path, tensors))
    faults = ["infinite values in hc_head_base", "NaN in layers.1.hc_ffn_fn"]
    assert sorted(source.not_finite(), key=str.lower) == faults
    with pytest.raises(
        CheckpointError, match=r"must be finite .*NaN in layers\.1\.hc_ffn_fn.*--inex"
    ):
        convert(source, TRANSFORMERS)
    done = convert(source, TRANSFORMERS, inexact=True, dtype=torch.bfloat16)
    assert set(faults) <= set(done.notes)


def test_a_dtype_of_too_small_a_range_is_refused(tmp_path):
    tensors = deepseek()
    tensors["layers.1.hc_ffn_fn"][3, 2] = 1e5
    source = open_checkpoint(saved(tmp_path, tensors))
    with pytest.raises(
        CheckpointError, match=r"too large for float16: .* in model\.layers\.1\.ffn_hc\.fn"
    ):
        convert(source, TRANSFORMERS, dtype=torch.float16)
    assert convert(source, TRANSFORMERS, dtype=torch.bfloat16).left_out == ()


def test_the_layouts_state_the_presets_numbers():
    for layout in LAYOUTS.values():
        preset = PRESETS[layout.numerics]
        assert layout.hc_eps == preset.hc_eps
        if layout.name != "megatron":
            assert layout.norm_eps == preset.norm_eps
        assert replace(layout.config(4), streams=4) == layout.config(4)
