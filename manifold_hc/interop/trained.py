"""Models and tokenizers of run folders and of exported models."""

import logging
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import torch

from manifold_hc.config import ConnectionConfig
from manifold_hc.data.tokenizer import FileTokenizer, Tokenizer
from manifold_hc.errors import CheckpointError, ConfigError, RunFolderError
from manifold_hc.interop.run_tensors import read_checkpoint
from manifold_hc.interop.safe_tensors import SafeTensors
from manifold_hc.interop.sections import build_section
from manifold_hc.interop.tensor_files import open_tensors
from manifold_hc.interop.weights import load_weights
from manifold_hc.models import Decoder, DecoderConfig
from manifold_hc.training import Checkpoints, RunFolder
from manifold_hc.training.checkpoint_files import MANIFEST, path_step
from manifold_hc.training.device import find_device
from manifold_hc.training.json_files import read_json
from manifold_hc.training.record import COMPARISON
from manifold_hc.training.run_tokenizer import run_tokenizer

logger = logging.getLogger("manifold_hc")

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"

MODEL_TYPE = "manifold_hc"
"""Value of `model_type` in the config.json of an exported model."""

PREFIX = "decoder."
"""Prefix of the names of an exported model's weights."""


class Loaded(NamedTuple):
    """A trained model and its tokenizer."""

    model: Decoder
    """The decoder, in eval mode: tokens [B, T] -> logits [B, T, V]."""
    tokenizer: Tokenizer
    """Tokenizer of the run: `encode([text])` and `decode(ids)`."""


def load_trained(path: str | Path, step: int | None, device: str) -> Loaded:
    """Load a run or an exported model, as `mhc.load` says."""
    folder = Path(path)
    found = find_device(device)
    config = read_config(folder)
    if is_exported(config):
        if step is not None:
            raise ConfigError(f"load: {folder} is an exported model, without steps; leave step out")
        loaded = _load_exported(folder, config)
    elif isinstance(config, dict) and "model_type" in config:
        raise RunFolderError(
            f"load: {folder} is a {config['model_type']} model of transformers; load it with "
            "transformers.AutoModelForCausalLM"
        )
    else:
        loaded = _load_run(RunFolder(folder), step)
    return loaded._replace(model=loaded.model.to(found).eval())


def is_exported(config: Any) -> bool:
    """Return True if the content of a config.json is that of an exported model."""
    return isinstance(config, dict) and config.get("model_type") == MODEL_TYPE


def read_config(folder: Path) -> Any:
    """Return the content of config.json; RunFolderError if the folder is of another kind."""
    if not folder.is_dir():
        missing = "does not exist" if not folder.exists() else "is not a folder"
        raise RunFolderError(f"load: {folder} {missing}; give the folder of a run")
    if (folder / MANIFEST).exists():
        run = shlex.quote(str(folder.absolute().parent.parent))
        raise RunFolderError(
            f"load: {folder} is one checkpoint; give its run, {run}, with step {path_step(folder)}"
        )
    if (folder / COMPARISON).exists():
        runs = sorted(str(file.parent) for file in folder.glob(f"*/*/{CONFIG}"))
        raise RunFolderError(
            f"load: {folder} is a comparison of {len(runs)} runs; give one of them"
            + (f", such as {runs[0]}" if runs else "")
        )
    if not (folder / CONFIG).exists():
        raise RunFolderError(
            f"load: {folder} has no {CONFIG}: it is neither a run of mhc train nor an exported "
            "model; give the folder of one"
        )
    return read_json(folder / CONFIG, "put a copy of it back")


def _load_run(run: RunFolder, step: int | None) -> Loaded:
    config = run.config()
    tokenizer = run_tokenizer(run.path, config.data, config.model.vocabulary)
    checkpoints = Checkpoints(run.checkpoints, config.checkpoint, data_sha256="")
    final = run.model_file
    try:
        found = checkpoints.find(step)
    except CheckpointError:
        if step is not None or not final.exists():
            raise
        found = None
        logger.warning("load: no checkpoint of %s is intact; %s is used", run.path, final.name)
    if found is None and not final.exists():
        again = shlex.quote(str(run.path))
        raise CheckpointError(
            f"load: {run.path} has no checkpoint yet; go on with: mhc train --resume {again}"
        )
    model = _untrained(config.model, config.connection)
    tensors = SafeTensors(final) if found is None else read_checkpoint(found)[0]
    load_weights(model, tensors, found or final)
    return Loaded(model, tokenizer)


def _load_exported(folder: Path, config: dict[str, Any]) -> Loaded:
    model = _untrained(
        build_section(DecoderConfig, config.get("model"), "model"),
        build_section(ConnectionConfig, config.get("connection"), "connection"),
    )
    load_weights(model, open_tensors(folder), folder, PREFIX)
    return Loaded(model, FileTokenizer(folder / TOKENIZER))


def _untrained(config: DecoderConfig, connection: ConnectionConfig) -> Decoder:
    """Build a decoder without a change of the random state."""
    with torch.random.fork_rng(devices=[]):
        return Decoder(config, connection)
