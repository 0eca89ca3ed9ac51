"""Load figures of the experts."""

from typing import Any

from torch import Tensor, nn

from manifold_hc.models import mixtures
from manifold_hc.parallel import in_depth_order


def load_figures(loads: list[Tensor], model: nn.Module, expected: int) -> dict[str, Any]:
    """Return the load of every expert in a step, by layer, and its imbalance.

    Args:
        loads: token counts [E] of the mixtures of `model`, as `balance` returns them.
        model: a decoder, or this rank's pipeline stages.
        expected: number of token-expert pairs per layer, K for each token of the batch.

    Returns:
        load: token counts by layer and expert. largest_load, smallest_load: over all layers, in
        units of an even load. dropped_tokens: expected pairs that are missing in `load`.
    """
    layers = zip(mixtures(model), loads, strict=True)
    load = in_depth_order(model, [(_sublayer(name), counts.tolist()) for name, counts in layers])
    evens = [sum(layer) / len(layer) for layer in load]
    return {
        "load": load,
        "largest_load": max(max(layer) / even for layer, even in zip(load, evens, strict=True)),
        "smallest_load": min(min(layer) / even for layer, even in zip(load, evens, strict=True)),
        "dropped_tokens": expected * len(load) - sum(map(sum, load)),
    }


def _sublayer(name: str) -> int:
    """Number of the sublayer in the name of its branch, such as "branches.3"."""
    return int(name.rpartition(".")[2])
