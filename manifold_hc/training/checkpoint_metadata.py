"""Index of a checkpoint, `.metadata`, read without executing its pickle.

torch.distributed.checkpoint writes the index with pickle and reads it with `pickle.load`, which
calls any function that the file names. Here a class named in the file becomes a record without
behaviour, every name that an index does not need is refused, and the values are checked and
converted to torch's own classes.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from manifold_hc.errors import CheckpointError
from manifold_hc.files import read_regular

INDEX = ".metadata"

NAMES = {
    **dict.fromkeys(
        (
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorStorageMetadata",
            "TensorProperties",
            "ChunkStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        ),
        ("torch.distributed.checkpoint.metadata",),
    ),
    "_StorageInfo": ("torch.distributed.checkpoint.filesystem",),
    "Size": ("torch",),
    "_get_layout": ("torch.serialization",),
    # Path of the folder it was written to; Python 3.13 has the classes in another module.
    "PosixPath": ("pathlib", "pathlib._local"),
    "WindowsPath": ("pathlib", "pathlib._local"),
}
"""Names that the index may contain besides dtypes, with their modules.

BytesStorageMetadata is missing: torch unpickles such entries with `weights_only=False`, and our
checkpoints have none.
"""


class Record:
    """Stand-in for a class that the index names: keeps its arguments and state."""

    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        """arguments: as in the file."""
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        """Keep the state unchanged."""
        self.state = state


class IndexUnpickler(pickle.Unpickler):
    """Unpickler that creates records and dtypes only."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a new record class or a dtype; raise UnpicklingError for every other name."""
        if module in NAMES.get(name, ()):
            return type(name, (Record,), {})
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no index needs")


def read_metadata(path: Path) -> Metadata:
    """Read the index of the checkpoint in the folder `path`.

    No name in the file is imported or called. Raises CheckpointError if the file cannot be read,
    contains an unknown name, or points to files outside the folder.
    """
    try:
        found = IndexUnpickler(io.BytesIO(read_regular(path / INDEX))).load()
        files = {file.name for file in path.iterdir()}
        return _metadata(found, files)
    except Exception as error:  # a damaged pickle may raise any
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise CheckpointError(f"checkpoint: {path / INDEX} is refused: {reason}") from None


class Reader(FileSystemReader):
    """Storage reader with an index from `read_metadata`; torch does not read the index."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        """metadata: result of `read_metadata(path)`."""
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Return the index."""
        return self._metadata


def _metadata(found: Any, files: set[str]) -> Metadata:
    fields = _fields(found, "Metadata")
    tensors = _typed(fields["state_dict_metadata"], dict)
    locations = _typed(fields["storage_data"], dict)
    return Metadata(
        state_dict_metadata={_typed(name, str): _tensor(entry) for name, entry in tensors.items()},
        storage_data={_key(key): _location(entry, files) for key, entry in locations.items()},
        storage_meta=StorageMeta(),
    )


def _tensor(found: Any) -> TensorStorageMetadata:
    fields = _fields(found, "TensorStorageMetadata")
    dtype = _typed(_state(fields["properties"], "TensorProperties", tuple)[0], torch.dtype)
    chunks = []
    for chunk in _typed(fields["chunks"], list):
        known = _fields(chunk, "ChunkStorageMetadata")
        chunks.append(ChunkStorageMetadata(_size(known["offsets"]), _size(known["sizes"])))
    return TensorStorageMetadata(TensorProperties(dtype), _size(fields["size"]), chunks)


def _key(found: Any) -> MetadataIndex:
    fields = _fields(found, "MetadataIndex")
    offset = fields.get("offset")
    return MetadataIndex(
        _typed(fields["fqn"], str),
        None if offset is None else _size(offset),
        _typed(fields.get("index"), int | None),
    )


def _location(found: Any, files: set[str]) -> _StorageInfo:
    fields = _fields(found, "_StorageInfo")
    file = _typed(fields.pop("relative_path"), str)
    offset, length = (_typed(fields.pop(name), int) for name in ("offset", "length"))
    if file not in files:
        raise ValueError(f"it points to {file}, which is not in the folder")
    if fields:
        raise ValueError(f"it has {min(fields)}, which is not read here")
    return _StorageInfo(file, offset, length)


def _size(found: Any) -> torch.Size:
    _typed(found, Record)
    (numbers,) = found.arguments
    return torch.Size([_typed(number, int) for number in _typed(numbers, tuple)])


def _fields(found: Any, name: str) -> dict[str, Any]:
    return dict(_state(found, name, dict))


def _state(found: Any, name: str, kind: Any) -> Any:
    if type(found).__name__ != name:
        raise TypeError(f"it has a {type(found).__name__} in place of a {name}")
    return _typed(found.state, kind)


def _typed(value: Any, kind: Any) -> Any:
    """Return the value; raise TypeError if it is not of the kind."""
    if not isinstance(value, kind):
        raise TypeError(f"it has a {type(value).__name__} where {kind} belongs")
    return value
