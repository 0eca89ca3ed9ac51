"""A copy rounded to a narrower dtype is equal; changed weights and conventions are still found."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from manifold_hc.interop.layouts import LAYOUTS, open_checkpoint
from manifold_hc.verify import compare
from manifold_hc.verify.against import differing_weights, second_checkpoint
from manifold_hc.verify.rounding import round_together
from tests.verify.conftest import build

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture
def saved(tmp_path):
    def save(name, tensors, layout="transformers", **config):
        save_file(tensors, tmp_path / name)
        return open_checkpoint(tmp_path / name, layout, config)

    return save


@pytest.fixture
def tensors(stack):
    return LAYOUTS["transformers"].from_native(dict(stack.state_dict()))


def cast(tensors, narrow, stored):
    return {name: tensor.to(narrow).to(stored) for name, tensor in tensors.items()}


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_cast_back", [False, True])
@pytest.mark.parametrize("swapped", [False, True])
def test_a_rounded_copy_is_equal(saved, tensors, narrow, is_cast_back, swapped):
    copy = cast(tensors, narrow, torch.float32 if is_cast_back else narrow)
    one, two = saved("a", tensors), saved("b", copy)
    found = round_together(*((two, one) if swapped else (one, two)))
    assert differing_weights(found.own, found.other) == []
    assert found.sentence == f"equal up to the rounding of {narrow} weights".replace("torch.", "")
    assert found.dtypes.keys() == one.native.keys()
    assert compare(found.own.stack(), second_checkpoint(found.own, found.other, 4, 0)).ok


def test_equal_checkpoints_are_unchanged(saved, tensors):
    one, two = saved("a", tensors), saved("b", tensors)
    found = round_together(one, two)
    assert (found.dtypes, found.sentence) == ({}, "")
    for name, value in one.native.items():
        assert torch.equal(found.own.native[name], value)
        assert torch.equal(found.other.native[name], value)


def test_rows_in_another_order_are_rounded_as_the_same_weights(saved):
    stack = build(constraint="sinkhorn_columns", exit="mean")
    native = dict(stack.state_dict())
    own = saved("a", LAYOUTS["transformers"].from_native(native), exit="mean")
    copy = cast(LAYOUTS["liger"].from_native(native), torch.bfloat16, torch.float32)
    other = saved("b", copy, "liger")
    found = round_together(own, other)
    assert "connections.3.maps.phi" in found.dtypes
    assert differing_weights(found.own, found.other) == []
    assert torch.equal(
        found.other.native["connections.3.maps.phi"], other.native["connections.3.maps.phi"]
    )


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_another_convention_of_a_rounded_copy_is_explained(saved, tensors, stored):
    own, copy = saved("a", tensors), saved("b", cast(tensors, torch.bfloat16, stored))
    copy = replace(copy, config=replace(copy.config, norm_eps=1e-4))
    found = round_together(own, copy)
    report = compare(found.own.stack(), second_checkpoint(found.own, found.other, 8, 0))
    assert report.diagnosis.sentences == [
        "the epsilon of the norm is 0.0001; fits all 4 sublayers and the exit"
    ]


def test_one_changed_entry_is_no_rounding(saved, tensors):
    """1 is what bfloat16 makes of 1.0003, but the other entries are equal."""
    name = "model.layers.1.ffn_hc.scale"
    tensors[name] = torch.ones(3)
    changed = tensors | {name: torch.tensor([1.0, 1.0003, 1.0])}
    found = round_together(saved("a", tensors), saved("b", changed))
    assert found.dtypes == {}
    (one,) = differing_weights(found.own, found.other)
    assert (one.name, one.entries, one.first) == ("connections.3.maps.alpha", 1, (1,))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_one_changed_entry_of_a_rounded_copy_is_found(saved, tensors, stored):
    copy = cast(tensors, torch.bfloat16, stored)
    copy["model.layers.0.attn_hc.fn"][2, 5] += 0.5
    found = round_together(saved("a", tensors), saved("b", copy))
    (one,) = differing_weights(found.own, found.other)
    assert (one.name, one.entries, one.first) == ("connections.0.maps.phi", 1, (2, 5))
    report = compare(found.own.stack(), second_checkpoint(found.own, found.other, 4, 0))
    assert {x.index for x in report.differing} == {0}
