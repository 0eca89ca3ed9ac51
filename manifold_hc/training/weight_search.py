"""Search for weights in a folder: a run, one of its checkpoints, or an exported model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from manifold_hc.config import ConnectionConfig
from manifold_hc.data import DataConfig
from manifold_hc.data.equal_tokenizers import have_same_ids
from manifold_hc.data.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer
from manifold_hc.errors import CheckpointError, ConfigError, DataError
from manifold_hc.models import DecoderConfig
from manifold_hc.training.checkpoint import Checkpoints
from manifold_hc.training.checkpoint_files import MANIFEST, path_step, read_manifest
from manifold_hc.training.config import CheckpointConfig, RunConfig, leaves
from manifold_hc.training.folder import RunFolder
from manifold_hc.training.json_files import read_json
from manifold_hc.training.record import COMPARISON
from manifold_hc.training.run_tokenizer import run_tokenizer
from manifold_hc.training.weight_files import PREFIX
from manifold_hc.training.weight_source import (
    CHECKPOINTS,
    CheckpointSource,
    FileSource,
    WeightSource,
    with_older,
)

MODEL_TYPE = "manifold_hc"
"""`model_type` in the config.json of an export."""

Section = TypeVar("Section", DecoderConfig, ConnectionConfig)

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"


def find_weights(path: str | Path, step: int | None = None) -> WeightSource:
    """Find the weights in a folder; nothing but small files and headers is read.

    Args:
        path: a run folder, whose newest checkpoint is taken; one of its checkpoints; or an export:
            config.json with `model_type` "manifold_hc" and the fields of `DecoderConfig` and
            `ConnectionConfig` under "model" and "connection", model.safetensors with "decoder."
            before every name of the decoder's state_dict, and tokenizer.json.
        step: of a checkpoint in a run folder; the newest if left out.

    Returns:
        Path, step, model, connection, tokenizer and shapes of the weights.

    Raises:
        ConfigError: the folder is missing, holds no weights, or has no choice of steps.
        CheckpointError: the checkpoint is missing or damaged, or an export has other tensors.
        RunFolderError: config.json is damaged or of another version.

    Example:
        >>> from manifold_hc import training
        >>> steps = training.TrainingConfig(steps=2, batch=2, validation_batches=1)
        >>> config = training.RunConfig(training=steps)
        >>> summary = training.run(config, "runs/two")
        >>> source = training.find_weights("runs/two")
        >>> source.step, source.shapes["head.weight"]
        (2, (256, 96))
    """
    path = Path(path)
    if (path / MANIFEST).exists():
        found = _checkpoint(path, _run_of(path))
        if step not in (None, found.step):
            raise ConfigError(f"init: {path} is one checkpoint; leave the step {step} out")
        return found
    _require_folder(path)
    if (path / COMPARISON).exists():
        raise ConfigError(f"init: {path} holds several runs; give one, {path}/VARIANT/seed-N")
    if not (path / CONFIG).exists():
        raise ConfigError(
            f"init: {path} has no weights; give a run folder, a checkpoint in it, or a folder that "
            "holds an exported model"
        )
    content = read_json(path / CONFIG, "give other weights")
    if isinstance(content, dict) and "model_type" in content:
        if step is not None:
            raise ConfigError(f"init: {path} is an exported model; leave the step {step} out")
        return _export(path, content)
    return _run(path, step)


def _run(path: Path, step: int | None) -> WeightSource:
    """Weights of a run: of a checkpoint, or the final ones if it has no checkpoint."""
    run = RunFolder(path)
    config = run.config()
    paths = Checkpoints(run.checkpoints, CheckpointConfig(), "").paths()
    known = ", ".join(str(path_step(path)) for path in paths) or "none"
    if step is not None and step not in map(path_step, paths):
        raise CheckpointError(f"init: {path} has no checkpoint of step {step}; there are: {known}")
    if paths:
        chosen = paths[-1] if step is None else next(p for p in paths if path_step(p) == step)
        return _checkpoint(chosen, path)
    if not run.model_file.exists():
        raise ConfigError(f"init: {path} has no checkpoint yet; let the run save one first")
    tokenizer, data, reason = _tokenizer(path, config)
    return FileSource(path, config.model, config.connection, tokenizer, data, unreadable=reason)


def _checkpoint(path: Path, run: Path) -> CheckpointSource:
    try:
        config = read_manifest(path).config
    except CheckpointError as error:
        raise with_older(error, path) from None
    tokenizer, data, reason = _tokenizer(run, config)
    return CheckpointSource(
        path, config.model, config.connection, tokenizer, data, unreadable=reason
    )


def _run_of(checkpoint: Path) -> Path:
    """Run folder of a checkpoint; of a copy elsewhere the copy itself, which has no tokenizer."""
    for path in (checkpoint, checkpoint.absolute(), checkpoint.resolve()):
        if path.parent.name == CHECKPOINTS:
            return path.parent.parent
    return checkpoint


def _require_folder(path: Path) -> None:
    if path.is_dir():
        return
    if path.exists():
        raise ConfigError(f"init: {path} is a file; give the folder that holds it, {path.parent}")
    raise ConfigError(
        f"init: {path} does not exist; give a run folder, a checkpoint in it, or a folder that "
        "holds an exported model"
    )


def _export(path: Path, content: dict[str, Any]) -> FileSource:
    if content["model_type"] != MODEL_TYPE:
        raise ConfigError(
            f"init: {path} holds a model of type {content['model_type']}, not {MODEL_TYPE}; "
            "give a run folder or a model exported from one"
        )
    model = _section(path, content, "model", DecoderConfig)
    connection = _section(path, content, "connection", ConnectionConfig)
    tokenizer = _exported_tokenizer(path / TOKENIZER)
    data = DataConfig(tokenizer=tokenizer.name if tokenizer and tokenizer.source else "")
    return FileSource(path, model, connection, tokenizer, data, PREFIX)


def _exported_tokenizer(file: Path) -> Tokenizer | None:
    """Tokenizer of an export, whose tokenizer.json may stand for bytes; None without a file."""
    if not file.exists():
        return None
    found = FileTokenizer(file)
    return ByteTokenizer() if have_same_ids(ByteTokenizer(), found) else found


def _section(path: Path, content: dict[str, Any], name: str, kind: type[Section]) -> Section:
    """Build one section of an export's config.json; its keys may be left out."""
    raw = content.get(name, {})
    try:
        section = msgspec.convert(raw, kind)
    except (msgspec.ValidationError, ConfigError) as error:
        raise ConfigError(f"init: {path / CONFIG}: {name}: {error}") from None
    if unknown := set(_keys(raw)) - {key for key, _ in leaves(section)}:
        raise ConfigError(f"init: {path / CONFIG}: {name}.{min(unknown)} is not known here")
    return section


def _keys(section: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the keys of the leaves of nested mappings, with dots between."""
    for name, value in section.items():
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _tokenizer(run: Path, config: RunConfig) -> tuple[Tokenizer | None, DataConfig, str]:
    """Tokenizer of a run, the keys of data that choose it, and the reason if it is unreadable."""
    try:
        tokenizer = run_tokenizer(run, config.data, config.model.vocabulary)
    except DataError as error:
        return None, DataConfig(), str(error)
    if not tokenizer.source:
        return tokenizer, DataConfig(), ""
    return tokenizer, DataConfig(tokenizer=tokenizer.name, boundary=config.data.boundary), ""
