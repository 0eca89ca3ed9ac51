"""Weights of a run of this package: the final ones of a run folder, or those of a checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from manifold_hc.errors import CheckpointError, RunFolderError
from manifold_hc.interop.safe_tensors import SafeTensors
from manifold_hc.training import RunFolder
from manifold_hc.training.checkpoint import Checkpoints
from manifold_hc.training.checkpoint_files import (
    MANIFEST,
    WEIGHTS,
    ignored_warning,
    read_manifest,
    reason_of,
    verify,
)
from manifold_hc.training.checkpoint_metadata import Reader, read_metadata


def open_run(folder: Path) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """Return the weights of a run and its configuration as JSON.

    folder: of a run, whose final weights are read, or those of its newest checkpoint if it has not
    ended; or of one checkpoint. Raises CheckpointError for damaged files, RunFolderError for a run
    without weights.
    """
    if (folder / MANIFEST).exists():
        verify(folder)
        return read_checkpoint(folder)
    run = RunFolder(folder)
    config = run.config()
    if run.model_file.exists():
        return SafeTensors(run.model_file), msgspec.to_builtins(config)
    newest = Checkpoints(run.checkpoints, config.checkpoint, "").find()
    if newest is None:
        raise RunFolderError(f"run folder: {folder} has neither final weights nor a checkpoint")
    return read_checkpoint(newest)


def read_checkpoint(folder: Path) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """Return weights and configuration of a verified checkpoint."""
    manifest = read_manifest(folder)
    config: dict[str, Any] = msgspec.to_builtins(manifest.config)
    if (folder / WEIGHTS).exists():
        return SafeTensors(folder / WEIGHTS), config
    metadata = read_metadata(folder)
    weights = {
        name.removeprefix("model."): torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
        if name.startswith("model.") and isinstance(entry, TensorStorageMetadata)
    }
    try:
        with ignored_warning():
            load({"model": weights}, storage_reader=Reader(folder, metadata), no_dist=True)
    except CheckpointException as error:
        raise CheckpointError(f"{folder}: cannot be read: {reason_of(error)}") from None
    return weights, config
