"""Stability figures of a whole network, taken from outside on a fixed probe batch."""

from typing import Any

import torch
from torch import Tensor, nn

from manifold_hc.connection import Connection
from manifold_hc.diagnostics.gain import (
    amax_gain,
    composites,
    log_column_sum,
    stochastic_distance,
)
from manifold_hc.diagnostics.streams import effective_rank, pairwise_cosine
from manifold_hc.errors import ConfigError, ShapeError
from manifold_hc.functional import Reading


class GainMonitor:
    """Runs a probe batch and reports what the connections did to it.

    The matrices are those that the forward pass used, caught on their way from every connection's
    maps, in the order of the calls. The model's mode, gradients and random state are left as they
    were.
    """

    name: str = "gain"

    @property
    def shown(self) -> dict[str, str]:
        """What a progress view shows: its label, and the key of the figure."""
        return {"gain": "gain_forward", "backward": "gain_backward"}

    def __init__(self, probe: Tensor) -> None:
        """probe: the model's input, kept for every call."""
        self.probe = probe

    def __call__(self, model: nn.Module) -> dict[str, Any]:
        """Lists have one entry a sublayer, in depth order.

        gain_forward, gain_backward: largest composite gain over depth, mean over tokens of gains;
        gains, matrices: the four rows of `AmaxGain` for both token averages;
        composite: token mean of the composite matrices [L, n, n];
        log_column_sum, composite_log_column_sum, stochastic_distance: of single and composite;
        stream_cosine, stream_rank: of the streams that each sublayer met.
        """
        matrices, streams = capture(model, self.probe)
        products = composites(matrices)
        gains = {average: amax_gain(matrices, average) for average in ("gains", "matrices")}
        return {
            "gain_forward": float(gains["gains"].composite_forward.max()),
            "gain_backward": float(gains["gains"].composite_backward.max()),
            **{
                average: {name: row.tolist() for name, row in gain._asdict().items()}
                for average, gain in gains.items()
            },
            "composite": products.mean(1).tolist(),
            "log_column_sum": log_column_sum(matrices).tolist(),
            "composite_log_column_sum": log_column_sum(products).tolist(),
            "stochastic_distance": stochastic_distance(matrices).tolist(),
            "stream_cosine": [pairwise_cosine(x) for x in streams],
            "stream_rank": [effective_rank(x) for x in streams],
        }


@torch.no_grad()
def capture(model: nn.Module, probe: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Every connection's `res` [L, tokens, n, n] and its streams [tokens, n, C].

    In the order in which the model calls them; a connection that is called twice counts twice.
    Raises ConfigError when it calls none, ShapeError when they differ in n or in tokens.
    """
    found: list[tuple[Tensor, Tensor]] = []

    def keep(_: nn.Module, arguments: tuple[Any, ...], reading: Reading) -> None:
        # On the CPU, because not every device has float64.
        x, res = reading.x.cpu(), reading.res.cpu()
        found.append((res.reshape(-1, *res.shape[-2:]), x.reshape(-1, *x.shape[-2:])))

    handles = [
        module.maps.register_forward_hook(keep)
        for module in model.modules()
        if isinstance(module, Connection)
    ]
    modes = [(module, module.training) for module in model.modules()]
    cuda = [probe.device] if probe.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=cuda):
            model.eval()
            model(probe)
    finally:
        for module, training in modes:
            module.training = training
        for handle in handles:
            handle.remove()
    if not found:
        raise ConfigError("GainMonitor: the model calls no manifold_hc.Connection")
    if len({res.shape for res, _ in found}) > 1:
        raise ShapeError(
            "GainMonitor: every connection must have the same streams and tokens but res are "
            f"{sorted({tuple(res.shape) for res, _ in found})}; watch one stack at a time"
        )
    return torch.stack([res for res, _ in found]), [x for _, x in found]
