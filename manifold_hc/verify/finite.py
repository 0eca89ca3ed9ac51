"""Weights that are NaN or infinite: no comparison of results says anything about them."""

from manifold_hc.errors import CheckpointError
from manifold_hc.interop.layouts import Checkpoint

SHOWN = 3
"""Largest number of tensors that the message names."""


def require_finite(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError, which names the tensors, if a connection has a value not finite."""
    files = checkpoint.files
    wrong = [name for name in checkpoint.used if not files[name].isfinite().all()]
    if wrong:
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise CheckpointError(
            f"{files.path}: weights must be finite but {', '.join(wrong[:SHOWN])}{more} "
            f"{'has' if len(wrong) == 1 else 'have'} NaN or infinite values; repair the file"
        )
