"""Weights in safetensors files: model.safetensors, or several with an index."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from manifold_hc.errors import CheckpointError
from manifold_hc.files import open_regular, read_regular
from manifold_hc.maps import copy_whole

PREFIX = "decoder."
"""Prefix of the decoder's tensors in an export."""

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

FLOATS = {"F64", "F32", "F16", "BF16"}
"""Dtypes of safetensors that hold weights."""


class WeightFiles:
    """The safetensors files in a folder, as one mapping from names to tensors."""

    def __init__(self, folder: Path, prefix: str = "") -> None:
        """prefix: of every name in the files; the names of this class are without it."""
        self.folder = folder
        self.prefix = prefix

    def files(self) -> list[Path]:
        """Return the files; raise CheckpointError if the index is damaged or leaves the folder."""
        index = self.folder / INDEX
        if not index.exists():
            return [self.folder / WEIGHTS]
        try:
            found = msgspec.json.decode(read_regular(index), type=_Index)
        except (OSError, msgspec.MsgspecError, UnicodeError) as error:
            raise CheckpointError(f"weights: {index} cannot be read: {error}") from None
        names = sorted(set(found.weight_map.values()))
        if outside := [name for name in names if Path(name).name != name]:
            raise CheckpointError(f"weights: {index} points to {outside[0]}, outside its folder")
        return [self.folder / name for name in names]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor, by name.

        Raises CheckpointError for a file that is missing or damaged, and for a tensor without the
        prefix or with a dtype other than float64, float32, float16 or bfloat16.
        """
        shapes = {}
        for file in self.files():
            with _opened(file) as content:
                for key in content.keys():  # noqa: SIM118
                    name, values = self._name(file, key), content.get_slice(key)
                    if (dtype := values.get_dtype()) not in FLOATS:
                        raise CheckpointError(f"weights: {key} in {file} has the dtype {dtype}")
                    shapes[name] = tuple(values.get_shape())
        return shapes

    def read(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the files' values into `tensors`, which may be shards of DTensors.

        Raises CheckpointError for a file that is missing or damaged.
        """
        for file in self.files():
            with _opened(file) as content:
                for key in content.keys():  # noqa: SIM118
                    wanted = tensors.get(self._name(file, key))
                    if wanted is not None:
                        values = content.get_tensor(key)
                        with torch.no_grad():
                            copy_whole(wanted, values.to(wanted.device, wanted.dtype))

    def sha256(self) -> str:
        """Return the SHA-256 of the file, or of the lines `digest  name` of several files."""
        digests = {}
        for file in self.files():
            with open_regular(file) as content:
                digests[file.name] = hashlib.file_digest(content, "sha256").hexdigest()
        if len(digests) == 1:
            return next(iter(digests.values()))
        lines = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
        return hashlib.sha256(lines.encode()).hexdigest()

    def _name(self, file: Path, key: str) -> str:
        if not key.startswith(self.prefix):
            raise CheckpointError(
                f"weights: {key} in {file} is no tensor of the decoder: their names begin with "
                f"{self.prefix!r}"
            )
        return key.removeprefix(self.prefix)


class _Index(msgspec.Struct):
    """The part of model.safetensors.index.json that is read."""

    weight_map: dict[str, str]


@contextmanager
def _opened(file: Path) -> Iterator[safe_open]:
    """Open a safetensors file; raise CheckpointError if it is missing or damaged."""
    try:
        open_regular(file).close()
        with safe_open(file, framework="pt") as content:
            yield content
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"weights: {file} cannot be read: {reason}") from None
