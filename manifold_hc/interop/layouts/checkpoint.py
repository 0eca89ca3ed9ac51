"""Checkpoints of other libraries, opened as connections of ours."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from manifold_hc.config import ConnectionConfig
from manifold_hc.errors import CheckpointError
from manifold_hc.interop.layouts import reading, settings, table
from manifold_hc.interop.layouts.layout import Layout
from manifold_hc.interop.layouts.table import LAYOUTS
from manifold_hc.interop.tensor_files import TensorFiles, open_tensors
from manifold_hc.stack import Stack


@dataclass(frozen=True)
class Checkpoint:
    """Connections of a model in files of another library."""

    files: TensorFiles
    """All tensors of the model; each is read when it is used."""
    layout: Layout
    """Layout of the files."""
    config: ConnectionConfig
    """Configuration with which our forward pass equals the model's."""
    channels: int
    """Channels C."""
    sublayers: int
    """Number of sublayers."""
    native: dict[str, Tensor]
    """Parameters of the connections by the names of `Stack.state_dict()`, in the file's dtypes."""
    used: tuple[str, ...]
    """Names of the connections' tensors."""
    other: tuple[str, ...]
    """Names of the tensors that are no connection's: branches, norms, embeddings."""
    assumed: tuple[str, ...]
    """Fields of the configuration that nothing in the files gives: they are the layout's."""
    prefix: str
    """First part of the connections' names."""

    def stack(self) -> Stack:
        """Return a Stack with the checkpoint's connections; bfloat16 values are widened exactly."""
        stack = Stack(self.channels, self.config, self.sublayers)
        stack.load_state_dict(self.native)
        return stack

    def not_finite(self) -> list[str]:
        """Describe the connections' tensors with NaN or infinite values, by name in the files.

        An example is "NaN in model.layers.1.hc_ffn_fn"; the list is empty if all are finite.
        """
        return reading.not_finite(self.files, self.used)


def open_checkpoint(
    path: str | Path, layout: str | None = None, overrides: Mapping[str, Any] | None = None
) -> Checkpoint:
    """Open the connections of a model in files of another library.

    Streams, channels and the number of sublayers come from the tensors' shapes; iterations,
    epsilons and the exit from a folder's config.json, from the metadata of a file that this package
    wrote, or from `overrides`. The layout's defaults take the place of those that are not given.

    Args:
        path: A safetensors file, a torch file, a folder with a model, or a run folder.
        layout: Name of the layout; None to find it by the tensors' names.
        overrides: Fields of `ConnectionConfig` that the files do not give.

    Returns:
        The connections, with the names of all other tensors.

    Raises:
        CheckpointError: For tensors that are missing, left over, transposed or renamed, each named;
            and for damaged files.
        ConfigError: For a path without tensors, an unknown layout, and overrides that are invalid
            or contradict the files.

    Example:
        >>> import tempfile, manifold_hc as mhc
        >>> from pathlib import Path
        >>> from safetensors.torch import save_file
        >>> from manifold_hc.interop.layouts import open_checkpoint
        >>> file = Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> save_file(mhc.Stack(8, sublayers=4).state_dict(), file)
        >>> checkpoint = open_checkpoint(file)
        >>> checkpoint.layout.name, checkpoint.config.streams, checkpoint.sublayers
        ('manifold', 4, 4)
    """
    files = open_tensors(Path(path))
    known = settings.gather(files, overrides or {})
    chosen = find_layout(files, layout or known.layout)
    found = reading.find(chosen.names, files)
    streams, _ = reading.sizes(found, files)
    known.require_streams(files, streams)
    config = known.config(chosen, streams, found.has_exit)
    sizes = chosen.measure(found, files, config, known.channels, known.layers)
    chosen.require(found, files, sizes)
    return Checkpoint(
        files=files,
        layout=chosen,
        config=sizes.config,
        channels=sizes.channels,
        sublayers=sizes.sublayers,
        native=chosen.collect(found, files, sizes),
        used=tuple(found.places.values()),
        other=found.other,
        assumed=known.assumed(),
        prefix=found.prefix,
    )


def find_layout(files: TensorFiles, name: str | None) -> Layout:
    """Return the layout `name`, or for None the one that the tensors' names fit.

    Raises ConfigError for an unknown name, CheckpointError if no layout or several of them fit.
    """
    if name is not None:
        return table.layout(name)
    counts = {one: len(reading.find(one.names, files).places) for one in LAYOUTS.values()}
    most = max(counts.values())
    fitting = [one for one, count in counts.items() if count == most]
    if most and len(fitting) == 1:
        return fitting[0]
    if most:
        names = ", ".join(one.name for one in fitting)
        raise CheckpointError(f"{files.path}: may be any of {names}; name the layout")
    known = "; ".join(f"{one.name}: {one.names.example()}" for one in LAYOUTS.values())
    raise CheckpointError(f"{files.path}: has no connections in a known layout ({known})")
