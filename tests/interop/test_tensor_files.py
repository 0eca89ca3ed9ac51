"""Reading and writing tensors: formats, damaged and hostile files, laziness."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from manifold_hc.errors import CheckpointError, ConfigError
from manifold_hc.interop.safe_tensors import write_tensors
from manifold_hc.interop.tensor_files import INDEX, open_tensors

pytestmark = pytest.mark.usefixtures("unchecked")

TENSORS = {"a": torch.randn(3, 2), "b.c": torch.arange(4), "d": torch.randn(2).bfloat16()}


def same(files, tensors=TENSORS):
    assert set(files) == tensors.keys()
    assert len(files) == len(tensors)
    assert all(torch.equal(files[name], tensor) for name, tensor in tensors.items())


def sharded(folder, **shards):
    """A folder with several safetensors files and their index."""
    listed = {}
    for stem, tensors in shards.items():
        save_file(tensors, folder / f"{stem}.safetensors")
        listed |= dict.fromkeys(tensors, f"{stem}.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": listed}))
    return folder


def test_a_safetensors_file(tmp_path):
    file = tmp_path / "x.safetensors"
    write_tensors(file, TENSORS, {"key": "value"})
    files = open_tensors(file)
    same(files)
    assert files.metadata == {"key": "value"}
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    with pytest.raises(KeyError):
        files["z"]


def test_a_folder_with_one_file(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"hc_mult": 4}')
    files = open_tensors(tmp_path)
    same(files)
    assert files.config == {"hc_mult": 4}


def test_several_files_with_an_index(tmp_path):
    sharded(tmp_path, one={"a": TENSORS["a"]}, two={name: TENSORS[name] for name in ("b.c", "d")})
    same(open_tensors(tmp_path))


INDEXES = {
    "a file is missing": ({"a": "gone.safetensors"}, "lacks gone.safetensors"),
    "a tensor is missing": ({"a": "one.safetensors", "z": "one.safetensors"}, "disagree about z"),
    "a tensor is not listed": ({}, "disagree about a"),
    "outside the folder": ({"a": "../x.safetensors"}, "is not a file of this folder"),
    "an absolute path": ({"a": "/etc/passwd"}, "is not a file of this folder"),
    "no names of files": ({"a": 3}, "weight_map must map"),
}


@pytest.mark.parametrize("name", INDEXES)
def test_an_index_that_disagrees(tmp_path, name):
    listed, message = INDEXES[name]
    sharded(tmp_path, one={"a": TENSORS["a"]})
    if not listed:
        save_file(TENSORS, tmp_path / "one.safetensors")
        listed = {"b.c": "one.safetensors", "d": "one.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": listed}))
    with pytest.raises(CheckpointError, match=message):
        open_tensors(tmp_path)


def test_two_files_with_the_same_tensor(tmp_path):
    both = {name: TENSORS[name] for name in ("a", "d")}
    sharded(tmp_path, one=both, two={"a": TENSORS["a"]})
    with pytest.raises(CheckpointError, match="disagree about a"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_torch_file(tmp_path, zipped):
    file = tmp_path / "x.pt"
    torch.save(TENSORS, file, _use_new_zipfile_serialization=zipped)
    same(open_tensors(file))
    torch.save({"model": TENSORS, "step": 3}, file, _use_new_zipfile_serialization=zipped)
    files = open_tensors(file)
    same(files)
    assert files.left_out == ("step",)
    torch.save(TENSORS | {3: torch.ones(2)}, file)
    assert open_tensors(file).left_out == ("3",)


class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_needs_more_is_refused_and_runs_nothing(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save(TENSORS | {"x": Attack()}, "x.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        CheckpointError, match=r"x\.bin: is refused, because a pickle can"
    ) as caught:
        open_tensors(tmp_path / "x.bin")
    message = str(caught.value)
    assert message.endswith(
        "tensors: it asks for posix.mkdir; ask its author for a safetensors file"
    )
    assert message.isprintable()
    assert "weights_only" not in message
    (tmp_path / "y.pt").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(CheckpointError, match=r"y\.pt: "):
        open_tensors(tmp_path / "y.pt")
    assert not (tmp_path / "attacked").exists()


def damaged_files(folder):
    save_file(TENSORS, folder / "whole.safetensors")
    whole = (folder / "whole.safetensors").read_bytes()
    (folder / "short.safetensors").write_bytes(whole[:-3])
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "text.safetensors").write_text("not a tensor")
    (folder / "text.pt").write_text("not a tensor")
    (folder / "empty.pt").write_bytes(b"")
    torch.save(TENSORS, folder / "cut.pt")
    (folder / "cut.pt").write_bytes((folder / "cut.pt").read_bytes()[:200])
    torch.save([1, 2], folder / "list.pt")
    torch.save({"step": 3}, folder / "number.pt")
    torch.save({"a": torch.eye(3).to_sparse()}, folder / "sparse.pt")
    torch.save({"a\x1b[2J": torch.eye(3)}, folder / "control.pt")
    os.mkfifo(folder / "fifo.pt")
    (folder / "whole.safetensors").unlink()
    return sorted(folder.iterdir())


def test_damaged_files_are_one_line(tmp_path):
    for file in damaged_files(tmp_path):
        with pytest.raises(CheckpointError, match=file.name) as caught:
            open_tensors(file)
        assert str(caught.value).isprintable(), file
        assert "weights_only" not in str(caught.value), file


def test_a_damaged_config(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    for text in ("{", "[]", "\xff", "[" * 100_000):
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
        with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
            open_tensors(tmp_path)


def test_paths_without_tensors(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        open_tensors(tmp_path / "gone")
    with pytest.raises(ConfigError, match=r"has no model\.safetensors\.index\.json"):
        open_tensors(tmp_path)
    for name in ("a", "b"):
        save_file(TENSORS, tmp_path / f"{name}.safetensors")
    with pytest.raises(ConfigError, match="has 2 safetensors files and no"):
        open_tensors(tmp_path)


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    file = tmp_path / "x.safetensors"
    write_tensors(file, TENSORS, {})
    before = file.read_bytes()
    with pytest.raises(TypeError):
        write_tensors(file, {"a": TENSORS["a"]}, {"key": 3})
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_tensors(file, {"a": torch.ones(2, dtype=torch.complex128)}, {})
    assert file.read_bytes() == before
    blocked = tmp_path / "folder.safetensors"
    blocked.mkdir()
    with pytest.raises(IsADirectoryError, match=r"folder\.safetensors"):
        write_tensors(blocked, TENSORS, {})
    assert {path.name for path in tmp_path.iterdir()} == {"x.safetensors", "folder.safetensors"}


def test_tied_tensors_are_written_twice(tmp_path):
    tied = {"a": TENSORS["a"], "b": TENSORS["a"], "c": TENSORS["a"].mT}
    write_tensors(tmp_path / "x.safetensors", tied, {})
    same(open_tensors(tmp_path / "x.safetensors"), tied)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_tensors_are_mapped_from_the_file(tmp_path):
    """The memory of a tensor is that of the file: no copy of a large model is held."""
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1000)}, file)
    torch.save({"a": torch.zeros(1000)}, tmp_path / "x.pt")
    for name in (file, tmp_path / "x.pt"):
        tensor = open_tensors(name)["a"]
        maps = Path("/proc/self/maps").read_text().splitlines()
        ranges = [line.split()[0].split("-") for line in maps if line.endswith(str(name))]
        address = tensor.data_ptr()
        assert any(int(first, 16) <= address < int(last, 16) for first, last in ranges), name
