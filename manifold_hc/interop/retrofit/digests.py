"""Digests of every value of a model's base weights."""

import ctypes
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor, nn

from manifold_hc.errors import ConfigError
from manifold_hc.interop.retrofit.blocks import NAME, connection_tensors

CHUNK = 2**20
"""Values that are hashed at once."""

WORKERS = 8
"""Largest number of threads; SHA-256 runs outside of Python's global lock."""

DIGITS = 16
"""Hexadecimal digits of a digest."""


class Digests(NamedTuple):
    """Digests of a model: equal values, names and shapes have equal digests."""

    exact: str
    """Of all bytes, each tensor in its own dtype."""
    rounded: str
    """The same with floating-point values rounded to bfloat16, for a model in another dtype."""
    dtype: str
    """Names of the dtypes of the tensors, sorted and joined by "+"."""


def digests_of(model: nn.Module) -> Digests:
    """Return the digests of all parameters and persistent buffers but the connections'.

    Tied weights count once. Tensors on the meta device count by name and shape alone.

    Raises:
        ConfigError: If a weight is a DTensor: each process holds a part of it.
    """
    named = dict(_base_tensors(model))
    for name, tensor in named.items():
        if hasattr(tensor, "full_tensor"):
            raise ConfigError(
                f"retrofit: the base weights must be whole to be compared but {name} is a DTensor; "
                "convert, save and load adapters before the model is sharded"
            )
    with ThreadPoolExecutor(min(WORKERS, os.cpu_count() or 1)) as pool:
        found = list(pool.map(_tensor_digests, named.values()))
    exact, rounded = hashlib.sha256(), hashlib.sha256()
    for (name, tensor), (own, coarse) in zip(named.items(), found, strict=True):
        head = f"{name} {list(tensor.shape)}".encode()
        exact.update(head + f" {tensor.dtype} ".encode() + own)
        rounded.update(head + b" " + coarse)
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in named.values()})
    return Digests(exact.hexdigest()[:DIGITS], rounded.hexdigest()[:DIGITS], "+".join(dtypes))


def _base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    own = connection_tensors(model)
    for name, parameter in model.named_parameters():
        if name not in own:
            yield name, parameter.detach()
    for path, module in model.named_modules():
        if NAME in path.split("."):
            continue
        for key, buffer in module.named_buffers(recurse=False):
            if key not in module._non_persistent_buffers_set:
                yield f"{path}.{key}".removeprefix("."), buffer.detach()


def _tensor_digests(tensor: Tensor) -> tuple[bytes, bytes]:
    """Return the exact and the rounded digest of one tensor."""
    exact, rounded = hashlib.sha256(), hashlib.sha256()
    rounds = tensor.is_floating_point() and tensor.dtype != torch.bfloat16
    if not tensor.is_meta:
        for chunk in tensor.reshape(-1).split(CHUNK):
            values = chunk.cpu()
            _update(exact, values)
            if rounds:
                _update(rounded, values.to(torch.bfloat16))
    return exact.digest(), (rounded if rounds else exact).digest()


def _update(digest: "hashlib._Hash", values: Tensor) -> None:
    """Hash the bytes of a vector; the copy makes tensors without memory of their own an error."""
    if not values.numel():
        return
    data = values.contiguous().view(torch.uint8)
    plain = torch.empty(data.numel(), dtype=torch.uint8, device="cpu").copy_(data)
    digest.update((ctypes.c_ubyte * plain.numel()).from_address(plain.data_ptr()))
