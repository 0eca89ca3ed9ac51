"""Loading a foreign checkpoint executes no code from its files."""

import hashlib
import io
import os
import pickle
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from manifold_hc.errors import CheckpointError
from manifold_hc.training import CheckpointConfig, Checkpoints
from manifold_hc.training.checkpoint_files import load
from manifold_hc.training.checkpoint_metadata import read_metadata
from manifold_hc.training.state import TrainState
from manifold_hc.training.step import take_step
from manifold_hc.training.trainer import check
from tests.training import runs

CONFIG = runs.config(steps=2)
CPU = torch.device("cpu")
WEIGHT = "model.embedding.weight"


@pytest.fixture(scope="module")
def state():
    return TrainState(CONFIG, CPU)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, state):
    checkpoints = Checkpoints(tmp_path_factory.mktemp("run"), CheckpointConfig(), "data")
    take_step(state, check(CONFIG, runs.text()).training.take(0, 4), CONFIG)
    assert checkpoints.save(state)
    return checkpoints.folder


@pytest.fixture
def stranger(saved, tmp_path, monkeypatch):
    """A copy of the checkpoint; code executed from it would leave a file `ran`."""
    shutil.copytree(saved, tmp_path / "checkpoints")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "checkpoints" / "step-00000001"


def sign(path):
    """Recompute the checksums, as an attacker would."""
    files = sorted(file for file in path.iterdir() if file.name != "SHA256SUMS")
    lines = (f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.name}\n" for f in files)
    (path / "SHA256SUMS").write_text("".join(lines))


def resume(path, state):
    sign(path)
    found = Checkpoints(path.parent, CheckpointConfig(), "data").find()
    assert found == path
    load(found, state)


class Calls:
    def __init__(self, function, *arguments):
        self.called = function, arguments

    def __reduce__(self):
        return self.called


CODE = "open('ran', 'w').close()"
GETATTR = b"cbuiltins\ngetattr\n(cos\nsystem\nV__call__\ntR(Vtouch ran\ntR."
CHAIN = b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93\x8c\x09touch ran\x85R."
NESTED = (
    b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x09os.system\x93"
    b"\x8c\x09touch ran\x85R."
)
OLD = b"(S'touch ran'\nios\nsystem\n."

ATTACKS = {
    "os.system": pickle.dumps(Calls(os.system, "touch ran")),
    "subprocess": pickle.dumps(Calls(subprocess.check_call, ["touch", "ran"])),
    "eval": pickle.dumps(Calls(eval, CODE)),
    "exec": pickle.dumps(Calls(exec, CODE)),
    "open": pickle.dumps(Calls(open, "ran", "w")),
    "getattr": GETATTR,
    "a dotted name": CHAIN,
    "a dotted name in the module of the metadata": NESTED,
    "protocol 0": OLD,
    "torch.load": pickle.dumps(Calls(torch.load, "other.pt", "cpu")),
    "torch's rebuilding of storages": pickle.dumps(
        Calls(torch.storage._load_from_bytes, pickle.dumps(Calls(os.system, "touch ran")))
    ),
    "torch's rebuilding of tensors": pickle.dumps(
        Calls(torch._utils._rebuild_device_tensor_from_numpy, Calls(os.system, "touch ran"))
    ),
    "a known name of another module": b"cos\nMetadata\n)R.",
    "a dtype of another module": b"cos\nfloat32\n.",
    "inside metadata": pickle.dumps(Metadata({}, storage_data=Calls(os.system, "touch ran"))),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
@pytest.mark.filterwarnings("ignore")
def test_an_index_that_names_a_function_is_refused_and_runs_nothing(stranger, state, attack):
    (stranger / ".metadata").write_bytes(attack)
    with pytest.raises(CheckpointError, match=r"\.metadata is refused: UnpicklingError: it names"):
        resume(stranger, state)
    assert not Path("ran").exists()


def evil_bytes():
    content = io.BytesIO()
    torch.save(Calls(os.system, "touch ran"), content)
    return content.getvalue()


@pytest.mark.parametrize("kind", ["bytes", "tensor"])
def test_a_pickle_in_the_place_of_a_tensor_runs_nothing(stranger, state, kind):
    """torch unpickles entries of bytes without weights_only, and tensors with it."""
    index = pickle.loads((stranger / ".metadata").read_bytes())
    if kind == "bytes":
        index.state_dict_metadata[WEIGHT] = BytesStorageMetadata()
    else:
        index.storage_data.pop(MetadataIndex(WEIGHT, (0, 0)))
    places = [MetadataIndex(WEIGHT), MetadataIndex(WEIGHT, (0, 0), 0)]
    evil = evil_bytes()
    index.storage_data |= {place: _StorageInfo("__0_0.distcp", 0, len(evil)) for place in places}
    (stranger / ".metadata").write_bytes(pickle.dumps(index))
    data = stranger / "__0_0.distcp"
    data.write_bytes(evil + data.read_bytes()[len(evil) :])
    with pytest.raises(CheckpointError):
        resume(stranger, state)
    assert not Path("ran").exists()


def altered(path, change):
    index = pickle.loads((path / ".metadata").read_bytes())
    change(index)
    (path / ".metadata").write_bytes(pickle.dumps(index))


def elsewhere(name):
    def change(index):
        for info in index.storage_data.values():
            info.relative_path = name

    return change


def packed(index):
    for info in index.storage_data.values():
        info.transform_descriptors = ["zstd"]


CHANGES = {
    "packed tensors": (packed, "has transform_descriptors, which is not read here"),
    "a file above": (elsewhere("../other"), "points to ../other, which is not in the folder"),
    "a file anywhere": (elsewhere("/etc/passwd"), "points to /etc/passwd"),
    "no text": (elsewhere(7), "has a int where <class 'str'> belongs"),
    "no index": (lambda index: vars(index).pop("storage_data"), "KeyError: 'storage_data'"),
    "no dict": (lambda index: setattr(index, "state_dict_metadata", [1]), "has a list"),
    "a number": (
        lambda index: setattr(index.state_dict_metadata[WEIGHT], "size", (1, 2)),
        "has a tuple where .*Record",
    ),
    "another class": (
        lambda index: index.state_dict_metadata.update({WEIGHT: index}),
        "has a Metadata in place of a TensorStorageMetadata",
    ),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_an_index_of_something_else_is_named(stranger, change, message):
    altered(stranger, change)
    with pytest.raises(CheckpointError, match=message):
        read_metadata(stranger)


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"(((((", b"\x80\x04N.", b"\x80\xff."])
def test_an_index_that_is_no_pickle_is_named(stranger, content):
    (stranger / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata is refused: "):
        read_metadata(stranger)


def test_the_index_is_the_one_that_torch_reads(saved):
    path = saved / "step-00000001"
    wanted = pickle.loads((path / ".metadata").read_bytes())
    found = read_metadata(path)
    assert found.storage_data == wanted.storage_data
    assert found.state_dict_metadata.keys() == wanted.state_dict_metadata.keys()
    for name, entry in wanted.state_dict_metadata.items():
        assert found.state_dict_metadata[name].size == entry.size
        assert found.state_dict_metadata[name].chunks == entry.chunks
        assert found.state_dict_metadata[name].properties.dtype == entry.properties.dtype
