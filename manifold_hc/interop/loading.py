"""`mhc.load`: the model and the tokenizer of a run folder, or of an exported model."""

from pathlib import Path
from typing import TYPE_CHECKING

from manifold_hc.extras import require

if TYPE_CHECKING:
    from manifold_hc.interop.trained import Loaded


def load(path: str | Path, *, step: int | None = None, device: str = "cpu") -> "Loaded":
    """Load the model and the tokenizer of a run folder or of an exported model.

    No code of the files is run. A run of several processes is read whole by this one.

    Args:
        path: run folder of `mhc train`, or folder that `mhc convert --to huggingface` has written.
        step: step of the checkpoint; by default the newest that is intact, or the final weights of
            a run whose checkpoints are gone or damaged. An exported model has no steps.
        device: auto, cpu, cuda or mps.

    Returns:
        The pair `model, tokenizer`; the model is a `manifold_hc.models.Decoder` in eval mode.

    Raises:
        RunFolderError: if the folder is missing or holds neither a run nor an exported model.
        CheckpointError: if there is no checkpoint, or it is damaged or of another model; a tensor
            that is missing, unknown or of another shape is named.
        ConfigError: for a configuration that is not valid, or a device that is not there.
        DataError: if the run's tokenizer is not where its configuration says.
        MissingExtraError: if the extra `train` is not installed.

    Example:
        >>> import torch, manifold_hc as mhc
        >>> from manifold_hc import training
        >>> from manifold_hc.models import DecoderConfig
        >>> steps = training.TrainingConfig(steps=2, batch=2)
        >>> config = training.RunConfig(model=DecoderConfig(blocks=2), training=steps)
        >>> summary = training.run(config, "runs/two")
        >>> model, tokenizer = mhc.load("runs/two")
        >>> tokens = torch.tensor([tokenizer.encode(["To load"])[0].tolist()])
        >>> model(tokens).shape
        torch.Size([1, 7, 256])
    """
    require("mhc.load", "train")
    from manifold_hc.interop.trained import load_trained

    return load_trained(path, step, device)
