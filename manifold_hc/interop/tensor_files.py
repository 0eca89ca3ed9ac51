"""Tensors in files of other programs, read by name and without running code from the file.

safetensors and torch files are mapped into memory: a tensor is read when it is used.
"""

import json
import pickle
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manifold_hc.errors import CheckpointError, ConfigError
from manifold_hc.files import open_regular, read_regular
from manifold_hc.interop.safe_tensors import SafeTensors

INDEX = "model.safetensors.index.json"
"""Index of a model in several safetensors files: the file of every tensor."""

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Names of a model's file in a folder, the first one preferred."""

CHECKPOINT = "checkpoint.json"
"""File that a checkpoint of this package has."""

GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
"""Function or class that a pickle asks for, in the error of `torch.load`."""

ADAPTER = "retrofit.json"
"""Record of an adapter of this package, with the configuration of its connections."""

NESTED = ("model", "state_dict", "model_state_dict", "module")
"""Keys under which training programs put the tensors of a torch file."""


@dataclass(frozen=True)
class TensorFiles(Mapping[str, Tensor]):
    """Tensors of a model by name, in one or several files; each is read when it is asked for."""

    path: Path
    """File or folder that was opened."""
    tensors: Mapping[str, Tensor]
    """The tensors."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Metadata of a safetensors file."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Content of the folder's config.json, or of an adapter's record."""
    left_out: tuple[str, ...] = ()
    """Entries of a torch file that are no tensors of the model, such as an optimizer's state."""

    def __getitem__(self, name: str) -> Tensor:
        """Read a tensor."""
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self.tensors)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self.tensors)

    def __post_init__(self) -> None:
        """Raise CheckpointError for a name with control characters, which a terminal would run."""
        if hidden := [name for name in self.tensors if not name.isprintable()]:
            raise CheckpointError(f"{self.path}: has a tensor with an invalid name: {hidden[0]!r}")


class Sharded(Mapping[str, Tensor]):
    """Tensors of several files."""

    def __init__(self, shards: Mapping[str, Mapping[str, Tensor]]) -> None:
        """shards: the file of every tensor, by the tensor's name."""
        self._shards = shards

    def __getitem__(self, name: str) -> Tensor:
        """Read a tensor from its file."""
        return self._shards[name][name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._shards)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._shards)


def open_tensors(path: Path) -> TensorFiles:
    """Open the tensors of a model.

    Args:
        path: A safetensors file; a torch file, which is read with `weights_only=True`; a folder
            with one of them, or with several safetensors files and their index; or a run folder or
            checkpoint of this package.

    Returns:
        The tensors by name, with the file's metadata and the folder's config.json.

    Raises:
        CheckpointError: For a file that is damaged, a torch file that needs more than tensors, and
            a folder whose files and index disagree.
        ConfigError: For a path that does not exist, or holds no tensors.
    """
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise ConfigError(f"{path}: does not exist; give a file or a folder with tensors")
    config = read_config(path.parent / "config.json") or read_config(path.parent / ADAPTER)
    if _is_safetensors(path):
        file = SafeTensors(path)
        return TensorFiles(path, file, file.metadata, config)
    tensors, left_out = load_torch_file(path)
    return TensorFiles(path, tensors, {}, config, left_out)


def _open_folder(folder: Path) -> TensorFiles:
    config = read_config(folder / "config.json")
    is_run = "connection" in config and "model_type" not in config  # of transformers, an export
    config = config or read_config(folder / ADAPTER)
    if is_run or (folder / CHECKPOINT).exists():
        from manifold_hc.interop.run_tensors import open_run  # imports the trainer

        tensors, config = open_run(folder)
        return TensorFiles(folder, tensors, {}, config)
    if (folder / INDEX).exists():
        return TensorFiles(folder, _open_index(folder), {}, config)
    found = [folder / name for name in WEIGHTS if (folder / name).exists()]
    found = found or sorted(folder.glob("*.safetensors"))
    if len(found) > 1 and found[0].name not in WEIGHTS:
        raise ConfigError(
            f"{folder}: has {len(found)} safetensors files and no {INDEX}, which says which belong "
            "together; give one file"
        )
    if not found:
        raise ConfigError(
            f"{folder}: has no {INDEX}, {', '.join(WEIGHTS)} or other safetensors file"
        )
    file = open_tensors(found[0])
    return TensorFiles(folder, file.tensors, file.metadata, config, file.left_out)


def _open_index(folder: Path) -> Sharded:
    """Open the files that the index names; raise CheckpointError where they disagree with it."""
    index = _read_json(folder / INDEX)
    listed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(listed, dict) or not all(isinstance(v, str) for v in listed.values()):
        raise _unreadable(folder / INDEX, "weight_map must map names of tensors to files")
    names = sorted(set(listed.values()))
    # An index from a stranger must not reach files elsewhere.
    if outside := [name for name in names if Path(name).name != name]:
        raise _unreadable(folder / INDEX, f"{outside[0]!r} is not a file of this folder")
    if absent := [name for name in names if not (folder / name).exists()]:
        raise CheckpointError(f"{folder}: lacks {', '.join(absent)}, which its index names")
    files = {name: SafeTensors(folder / name) for name in names}
    here = {name: file for file, tensors in files.items() for name in tensors}
    counts = Counter(name for tensors in files.values() for name in tensors)
    wrong = {name for name, file in listed.items() if here.get(name) != file}
    wrong |= here.keys() - listed.keys() | {name for name, count in counts.items() if count > 1}
    if wrong:
        raise CheckpointError(
            f"{folder}: {INDEX} and the files disagree about {', '.join(sorted(wrong))}"
        )
    return Sharded({name: files[file] for name, file in listed.items()})


def load_torch_file(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Load a torch file with `weights_only=True`, which runs no code from it.

    Returns the tensors by name, and the names of entries that are no tensors of the model.
    Raises CheckpointError for a damaged file, and for one that needs other Python objects.
    """
    try:
        with open_regular(path) as file:
            zipped = zipfile.is_zipfile(file)
        with warnings.catch_warnings(action="ignore"):  # of pickles that are then refused
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped or None)
    except pickle.UnpicklingError as error:
        found = GLOBAL.search(str(error))
        reason = f"asks for {found[1]}" if found else "holds other operations, or is damaged"
        raise CheckpointError(
            f"{path}: is refused, because a pickle can run any code and this one needs more than "
            f"tensors: it {reason}; ask its author for a safetensors file"
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise _unreadable(
            path, str(error).splitlines()[0] if str(error) else "is cut short"
        ) from None
    return _tensors_of(path, content)


def _tensors_of(path: Path, content: object) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    if not isinstance(content, dict):
        raise _unreadable(path, f"holds a {type(content).__name__}, not tensors by name")
    if not any(isinstance(value, Tensor) for value in content.values()):
        nested = [key for key in NESTED if isinstance(content.get(key), dict)]
        if len(nested) != 1:
            raise _unreadable(
                path, f"holds {', '.join(map(str, content)) or 'nothing'}, no tensors"
            )
        rest = tuple(str(key) for key in content if key != nested[0])
        tensors, left_out = _tensors_of(path, content[nested[0]])
        return tensors, (*rest, *left_out)
    tensors = {
        key: value
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }
    if sparse := [key for key, value in tensors.items() if value.layout != torch.strided]:
        raise _unreadable(path, f"{', '.join(sparse)} must be dense")
    return tensors, tuple(str(key) for key in content if key not in tensors)


def read_config(file: Path) -> Mapping[str, Any]:
    """Return the content of a config.json, or nothing if it does not exist."""
    if not file.exists():
        return {}
    content = _read_json(file)
    if not isinstance(content, dict):
        raise _unreadable(file, "must be an object")
    return content


def _read_json(file: Path) -> Any:
    try:
        return json.loads(read_regular(file))
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(file, str(error)) from None


def _is_safetensors(path: Path) -> bool:
    """Return True for a safetensors file; torch files begin as a zip archive or a pickle."""
    try:
        with open_regular(path) as file:
            start = file.read(9)
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from None
    return path.suffix == ".safetensors" or start[8:9] == b"{"


def _unreadable(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path}: cannot be read: {reason}")
