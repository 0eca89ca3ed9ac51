"""Parameters with their n*n rows as res[o, i], whichever way a preset stores them."""

from collections.abc import Mapping

from torch import Tensor

from manifold_hc.interop.layouts import Checkpoint
from manifold_hc.interop.layouts.native import transpose_res
from manifold_hc.numerics import PRESETS


def oriented(checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring the n*n rows from the checkpoint's preset to res[o, i], or back from there."""
    n = checkpoint.config.n
    if checkpoint.config.kind != "mhc" or not PRESETS[checkpoint.config.numerics].res_is_transposed:
        return dict(tensors)
    return {
        name: transpose_res(value, n) if _has_res(name, value, n) else value
        for name, value in tensors.items()
    }


def _has_res(name: str, value: Tensor, n: int) -> bool:
    is_map = name.startswith("connections.") and not name.endswith("alpha")
    return is_map and value.shape[0] == n * n + 2 * n
