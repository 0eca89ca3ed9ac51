"""Tensors of safetensors files: mapped into memory for reading, written atomically."""

import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from manifold_hc.errors import CheckpointError
from manifold_hc.extras import require_train
from manifold_hc.files import open_regular


class SafeTensors(Mapping[str, Tensor]):
    """Tensors of one safetensors file; each is read from disk when it is used."""

    def __init__(self, path: Path) -> None:
        """Open the file and read its header; raise CheckpointError if it is damaged."""
        require_train(f"reading {path}")
        from safetensors import SafetensorError, safe_open

        try:
            open_regular(path).close()
            self._file = safe_open(path, framework="pt", device="cpu")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from None
        self.metadata: dict[str, str] = self._file.metadata() or {}
        self._names = dict.fromkeys(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        """Read a tensor."""
        if name not in self._names:
            raise KeyError(name)
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._names)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._names)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file under a temporary name, flush it to disk, and rename it to `path`.

    Tensors that are mapped from other files are copied without being held in memory. Raises OSError
    with `path` as its filename if it cannot be written, and CheckpointError for a tensor that the
    format does not take; a file that was there is then unchanged.
    """
    require_train(f"writing {path}")
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(_unshared(tensors), temporary, metadata=dict(metadata))
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(getattr(error, "errno", None), reason, str(path)) from None
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: cannot be written: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors, with copies in place of those that share memory, such as tied ones."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().contiguous()
        if plain.data_ptr() in seen:
            plain = plain.clone()
        seen.add(plain.data_ptr())
        result[name] = plain
    return result
