"""A second checkpoint: every entry that differs is counted, in any layout."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from manifold_hc.errors import CheckpointError
from manifold_hc.interop.layouts import LAYOUTS, open_checkpoint
from manifold_hc.verify import compare
from manifold_hc.verify.against import differing_weights, second_checkpoint
from tests.verify.conftest import build

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture
def saved(tmp_path):
    def save(name, layout, stack, change=None, **config):
        tensors = LAYOUTS[layout].from_native(dict(stack.state_dict()))
        for key, value in (change or {}).items():
            tensors[key] = value(tensors[key])
        save_file(tensors, tmp_path / name)
        return open_checkpoint(tmp_path / name, layout, config)

    return save


def test_equal_models_in_other_layouts_agree(saved, stack):
    own, other = saved("a", "transformers", stack), saved("b", "tile_kernels", stack)
    other = replace(other, config=own.config)
    assert differing_weights(own, other) == []
    found = compare(own.stack(), second_checkpoint(own, other, 4, 0))
    assert found.ok
    assert len(found.compared) == 4 * 5 + 1


def test_storage_of_res_is_no_difference(saved):
    """Liger-Kernel stores res[o, i] where DeepSeek stores its transpose."""
    stack = build(constraint="sinkhorn_columns", exit="mean")
    own, other = saved("a", "transformers", stack, exit="mean"), saved("b", "liger", stack)
    assert not torch.equal(
        own.files["model.layers.1.attn_hc.fn"], other.files["2.phi"].mT.contiguous()
    )
    assert differing_weights(own, other) == []


def test_one_entry_is_named(saved, stack):
    def change(tensor):
        tensor = tensor.clone()
        tensor[9, 4] += 1e-3
        return tensor

    own = saved("a", "transformers", stack)
    other = saved("b", "transformers", stack, {"model.layers.1.ffn_hc.fn": change})
    (one,) = differing_weights(own, other)
    assert (one.name, one.entries, one.size) == ("connections.3.maps.phi", 1, 24 * 32)
    # Row 9 is comb[0, 1]: of our res it is entry [1, 0], row 8 + 4.
    assert one.first == (12, 4)
    assert one.sentence.startswith("connections.3.maps.phi: 1 of 768 entries differ")
    found = compare(own.stack(), second_checkpoint(own, other, 4, 0))
    assert {x.index for x in found.differing} == {3}
    assert [x.tensor for x in found.differing] == ["res", "new"]


def test_rounding_to_a_narrower_dtype_is_no_difference(saved, stack):
    narrow = {"model.layers.0.attn_hc.fn": lambda tensor: tensor.bfloat16()}
    own = saved("a", "transformers", stack)
    assert differing_weights(own, saved("b", "transformers", stack, narrow)) == []


def test_other_sizes_and_exits_are_refused(saved, stack):
    own = saved("a", "transformers", stack)
    with pytest.raises(CheckpointError, match="must have 4 streams, 8 channels and 4 sublayers"):
        differing_weights(own, saved("b", "transformers", build(sublayers=2)))
    other = saved("c", "liger", build(constraint="sinkhorn_columns", exit="mean"))
    with pytest.raises(CheckpointError, match=r"c: has no exit\.alpha"):
        differing_weights(own, other)
