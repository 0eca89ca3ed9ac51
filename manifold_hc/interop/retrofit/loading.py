"""Loading of converted models that were saved as a whole; imports transformers when called."""

from pathlib import Path
from typing import Any

import torch

from manifold_hc.errors import CheckpointError
from manifold_hc.extras import require


def register() -> None:
    """Make the auto classes of transformers load saved retrofits by `from_pretrained`.

    `convert` (of a model of transformers), `load` and `load_adapter` do the same. Without it, an
    auto class raises an error for the unknown model_type of such a folder.

    Raises:
        MissingExtraError: If transformers is not installed.
    """
    require("retrofit.register", "transformers")
    from manifold_hc.interop.retrofit import whole_model

    whole_model.register()


def load(path: str | Path, *, dtype: torch.dtype | None = None) -> Any:
    """Load a converted model that `save_pretrained` has saved as a whole.

    For other options, such as `device_map`, call `register` and `from_pretrained` of an auto class.

    Args:
        path: Folder or hub name of the saved model.
        dtype: Dtype of the base model, None for the saved one; the connections stay in float32.

    Returns:
        The model in eval mode, of the class that was converted.

    Raises:
        CheckpointError: If it is not a saved retrofit, or tensors are missing, left over or of
            another shape, each of which is named.
        MissingExtraError: If transformers is not installed.
    """
    register()
    import transformers

    from manifold_hc.interop.retrofit.whole_model import MODEL_TYPE, SavedConfig, converted_model

    values, _ = transformers.PreTrainedConfig.get_config_dict(str(path))
    if values.get("model_type") != MODEL_TYPE:
        raise CheckpointError(
            f"load: {path} must be a saved retrofit but its model_type is "
            f"{values.get('model_type')!r}; load it with transformers and convert it"
        )
    config: Any = SavedConfig.from_dict(values)
    architecture = (config.architectures or [""])[0]
    original = getattr(transformers, architecture, None)
    if original is None:
        raise CheckpointError(
            f"load: {path} must hold a model of transformers but its architecture is "
            f"{architecture!r}; convert a model of its own class and load the weights into it"
        )
    chosen = {} if dtype is None else {"dtype": dtype}
    return converted_model(original).from_pretrained(str(path), config=config, **chosen)
