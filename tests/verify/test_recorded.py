"""Recordings: leading axes are free, sublayers may be left out, and every defect is named."""

import pytest
from safetensors.torch import save_file

from manifold_hc.errors import CheckpointError
from manifold_hc.verify import compare
from manifold_hc.verify.recorded import Recording, load_recording
from tests.verify.changed import recording

pytestmark = pytest.mark.usefixtures("unchecked")


def test_some_sublayers_of_a_batch_are_enough(stack, tmp_path):
    tensors = {
        name: tensor.unflatten(0, (2, 3)).contiguous()
        for name, tensor in recording(stack).items()
        if name.startswith(("sublayers.1", "sublayers.3"))
    }
    save_file(tensors, tmp_path / "mine.safetensors")
    found = load_recording(tmp_path / "mine.safetensors", stack)
    assert [one.index for one in found.observations()] == [1, 3]
    assert compare(stack, found).ok


def test_single_pass_needs_the_sublayer_before(stack):
    """u is left out where no streams of the sublayer before are recorded."""
    from tests.verify.conftest import build

    single = build(numerics="deepseek_v41")
    tensors = {
        name: tensor for name, tensor in recording(stack).items() if name.startswith("sublayers.2")
    }
    found = compare(single, Recording(tensors, single, "mine"))
    assert [one.tensor for one in found.compared] == ["new"]
    assert found.ok


def broken(tensors, change):
    if change == "missing":
        del tensors["sublayers.2.y"]
    elif change == "no result":
        del tensors["sublayers.2.u"], tensors["sublayers.2.new"]
    elif change == "transposed":
        tensors["sublayers.2.x"] = tensors["sublayers.2.x"].mT.contiguous()
    elif change == "short":
        tensors["sublayers.2.u"] = tensors["sublayers.2.u"][:2]
    elif change == "renamed":
        tensors["sublayers.2.out"] = tensors.pop("sublayers.2.new")
    elif change == "too many":
        tensors["sublayers.4.x"] = tensors["sublayers.3.x"].clone()
    elif change == "not finite":
        tensors["sublayers.2.y"][0] = float("nan")
    elif change == "integer":
        tensors["sublayers.2.y"] = tensors["sublayers.2.y"].long()
    elif change == "empty":
        tensors.clear()
    return tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "sublayers.2.y is missing"),
        ("no result", "sublayers.2 must have one of pre, post, res, u, new but has inputs alone"),
        ("transposed", "sublayers.2.x must be [6, 4, 8]"),
        ("short", "sublayers.2.u must be [6, 8]"),
        ("renamed", "sublayers.2.out is no name of a recording"),
        ("too many", "sublayers.4.x has no sublayer in the checkpoint, which has 4"),
        ("not finite", "sublayers.2.y has values that are not finite"),
        ("integer", "sublayers.2.y must be floating point but is torch.int64"),
        ("empty", "must have tensors such as sublayers.0.x but has none"),
    ],
)
def test_a_defect_is_named(stack, change, message):
    tensors = broken(recording(stack), change)
    with pytest.raises(CheckpointError) as error:
        Recording(tensors, stack, "mine")
    assert str(error.value).startswith("mine: ")
    assert message in str(error.value)


def test_a_file_that_is_no_recording_is_named(stack, tmp_path):
    file = tmp_path / "mine.safetensors"
    with pytest.raises(CheckpointError, match="No such file"):
        load_recording(file, stack)
    file.write_bytes(b"not tensors")
    with pytest.raises(CheckpointError, match="must be a safetensors file"):
        load_recording(file, stack)
    with pytest.raises(CheckpointError, match="not a regular file"):
        load_recording(tmp_path, stack)
