"""Export of a run as a folder of transformers."""

import secrets
from pathlib import Path

from manifold_hc.errors import ConfigError, RunFolderError
from manifold_hc.files import becoming
from manifold_hc.interop.huggingface.opening import wrap
from manifold_hc.interop.huggingface.tokenizers import as_transformers
from manifold_hc.interop.loading import load
from manifold_hc.interop.trained import Loaded


def export(run: str | Path | Loaded, folder: str | Path, *, step: int | None = None) -> Path:
    """Write a trained model and its tokenizer as a folder that transformers loads.

    The folder is complete or absent: it is written under a temporary name and renamed.

    Args:
        run: run folder, or the result of `mhc.load`.
        folder: where to write; must be new or empty.
        step: step of the run's checkpoint; the newest by default.

    Returns:
        The folder.

    Raises:
        RunFolderError: if the folder is not empty or cannot be written, or there is no run.
        CheckpointError: as `mhc.load`.

    Example:
        >>> from manifold_hc import training
        >>> from manifold_hc.interop.huggingface import export
        >>> from manifold_hc.models import DecoderConfig
        >>> steps = training.TrainingConfig(steps=2, batch=2)
        >>> config = training.RunConfig(model=DecoderConfig(blocks=2), training=steps)
        >>> summary = training.run(config, "runs/small")
        >>> sorted(file.name for file in export("runs/small", "exported").glob("*.json"))
        ['config.json', 'generation_config.json', 'tokenizer.json', 'tokenizer_config.json']
    """
    out = Path(folder)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunFolderError(f"export: {out} is not empty; choose another folder")
    if isinstance(run, Loaded) and step is not None:
        raise ConfigError("export: step belongs to a run folder; leave it out")
    loaded = run if isinstance(run, Loaded) else load(run, step=step)
    wrapped, tokenizer = wrap(loaded), as_transformers(loaded.tokenizer)
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    with becoming(out, temporary, "export"):
        temporary.mkdir(parents=True)
        wrapped.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return out
