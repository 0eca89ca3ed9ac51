"""Any folder with a causal language model: a run, an exported model, a model of transformers."""

from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from manifold_hc.errors import CheckpointError, ConfigError
from manifold_hc.interop.huggingface.modeling import ManifoldForCausalLM
from manifold_hc.interop.huggingface.tokenizers import as_transformers
from manifold_hc.interop.loading import load
from manifold_hc.interop.retrofit.loading import register
from manifold_hc.interop.trained import Loaded, is_exported, read_config
from manifold_hc.training.device import find_device


def open_model(
    path: str | Path, *, step: int | None = None, device: str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model and the tokenizer of a folder, as transformers has them.

    No code of the folder is run. A tensor that is missing or of another shape is an error.

    Args:
        path: run folder, exported model, or any folder that `AutoModelForCausalLM` loads.
        step: step of a run's checkpoint; the newest by default.
        device: auto, cpu, cuda or mps.

    Raises:
        RunFolderError: if the folder is missing or holds no model.
        CheckpointError: if the weights or the tokenizer cannot be loaded.
        ConfigError: for a step of a folder without steps, or a device that is not there.
    """
    folder, found = Path(path), find_device(device)
    config = read_config(folder)
    if isinstance(config, dict) and "model_type" in config and not is_exported(config):
        if step is not None:
            raise ConfigError(f"load: {folder} is a model, without steps; leave step out")
        model, tokenizer = _open_other(folder)
        nn.Module.to(model, found)
        return model.eval(), tokenizer
    loaded = load(folder, step=step, device=device)
    if not is_exported(config):
        return wrap(loaded), as_transformers(loaded.tokenizer)
    model = ManifoldForCausalLM.of(loaded.model)
    model.generation_config = GenerationConfig.from_pretrained(folder)
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def wrap(loaded: Loaded) -> ManifoldForCausalLM:
    """Return a loaded decoder as a model of transformers that stops at the end of a document."""
    model = ManifoldForCausalLM.of(loaded.model)
    model.generation_config.eos_token_id = loaded.tokenizer.boundary
    model.generation_config.pad_token_id = loaded.tokenizer.boundary
    return model


def _open_other(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model of transformers' own architectures, or a converted one, strictly."""
    register()
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        model, report = cast(
            tuple[PreTrainedModel, dict[str, Any]],
            AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options),
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"load: {folder} cannot be loaded: {reason}") from None
    for kind in ("missing_keys", "mismatched_keys"):
        if names := sorted(map(str, report[kind])):
            raise CheckpointError(
                f"load: {folder} is of another model; {kind.replace('_', ' ')}: {names[0]}"
                + (f" and {len(names) - 1} more" if names[1:] else "")
            )
    return model, tokenizer
