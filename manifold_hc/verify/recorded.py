"""Tensors recorded from any implementation of mHC, in a safetensors file.

| name | shape | tensor |
|---|---|---|
| `sublayers.N.x` | [*batch, n, C] | streams before sublayer N |
| `sublayers.N.y` | [*batch, C] | output of its branch |
| `sublayers.N.u` | [*batch, C] | input that it read |
| `sublayers.N.new` | [*batch, n, C] | streams after it |
| `sublayers.N.pre`, `.post` | [*batch, n] | read and write weights |
| `sublayers.N.res` | [*batch, n, n] | mixing matrix, res[o, i]: row = output stream |
| `exit.x`, `exit.h` | [*batch, n, C], [*batch, C] | last streams; their reduction |

x and y are required for every sublayer that is recorded, and one of the others; sublayers may be
left out.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from manifold_hc.errors import CheckpointError
from manifold_hc.files import open_regular
from manifold_hc.stack import Stack
from manifold_hc.verify.forward import channels_of
from manifold_hc.verify.observation import EXIT, SUBLAYER_TENSORS, Observation, Streams

NAME = re.compile(
    rf"sublayers\.(?P<index>0|[1-9]\d*)\.(?P<tensor>x|y|{'|'.join(SUBLAYER_TENSORS)})"
    r"|exit\.(?P<exit>x|h)"
)


class Recording:
    """Results of another implementation, recorded while it ran."""

    def __init__(self, tensors: Mapping[str, Tensor], stack: Stack, name: str) -> None:
        """Check that the tensors are a recording of a model with the stack's sizes.

        Args:
            tensors: By the names of the table above.
            stack: The stack to compare with.
            name: Name for messages, such as the file's.

        Raises:
            CheckpointError: For a tensor with another name, shape or dtype, for values that are not
                finite, and for a sublayer without inputs or results.
        """
        self.name = name
        self._observations = [
            _observation(index, given, stack, name)
            for index, given in _group(tensors, name).items()
        ]
        if not self._observations:
            raise CheckpointError(f"{name}: must have tensors such as sublayers.0.x but has none")
        # Inputs of a narrower dtype are exact in float64.
        results = [result for one in self._observations for result in one.results.values()]
        self.precision = max(
            (result.dtype for result in results), key=lambda dtype: torch.finfo(dtype).eps
        )

    def observations(self) -> Iterator[Observation]:
        """Yield the recorded sublayers in depth order, then the exit."""
        yield from self._observations


def load_recording(path: Path, stack: Stack) -> Recording:
    """Read a recording from a safetensors file, which runs no code.

    Raises CheckpointError for a file that is missing, damaged or no recording of the stack.
    """
    from safetensors import SafetensorError, safe_open

    try:
        open_regular(path).close()
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise CheckpointError(
            f"{path}: must be a safetensors file of recorded tensors: {reason}"
        ) from None
    return Recording(tensors, stack, str(path))


def _group(tensors: Mapping[str, Tensor], name: str) -> dict[int, dict[str, Tensor]]:
    """Group the tensors by sublayer, in depth order, with the exit last."""
    found: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = NAME.fullmatch(key)
        if match is None:
            raise CheckpointError(
                f"{name}: {key} is no name of a recording, such as sublayers.0.x or exit.h"
            )
        if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise CheckpointError(f"{name}: {key} must be floating point but is {tensor.dtype}")
        if not tensor.isfinite().all():
            raise CheckpointError(f"{name}: {key} has values that are not finite")
        index = EXIT if match["exit"] else int(match["index"])
        found.setdefault(index, {})[match["exit"] or match["tensor"]] = tensor
    return dict(sorted(found.items(), key=lambda item: (item[0] == EXIT, item[0])))


def _observation(index: int, given: Mapping[str, Tensor], stack: Stack, name: str) -> Observation:
    """Check the tensors of one sublayer and make their leading axes one."""
    where = "exit" if index == EXIT else f"sublayers.{index}"
    inputs = ("x",) if index == EXIT else ("x", "y")
    results = ("h",) if index == EXIT else SUBLAYER_TENSORS
    if index >= len(stack.connections):
        raise CheckpointError(
            f"{name}: {where}.x has no sublayer in the checkpoint, which has "
            f"{len(stack.connections)}"
        )
    if missing := [tensor for tensor in inputs if tensor not in given]:
        raise CheckpointError(f"{name}: {where}.{missing[0]} is missing")
    if not any(tensor in given for tensor in results):
        raise CheckpointError(
            f"{name}: {where} must have one of {', '.join(results)} but has inputs alone"
        )
    n, C = stack.config.n, channels_of(stack)
    tails = {"x": (n, C), "new": (n, C), "y": (C,), "u": (C,), "h": (C,), "res": (n, n)}
    batch = given["x"].shape[:-2]
    flat = {}
    for tensor, value in given.items():
        wanted = (*batch, *tails.get(tensor, (n,)))
        if value.shape != wanted or not value.numel():
            raise CheckpointError(
                f"{name}: {where}.{tensor} must be {list(wanted)} in a model with n = {n} and "
                f"C = {C}, with at least one token, but is {list(value.shape)}"
            )
        flat[tensor] = value.reshape(-1, *wanted[len(batch) :])
    streams = Streams(flat["x"], flat.get("y"))
    return Observation(index, streams, {name: flat[name] for name in results if name in flat})
