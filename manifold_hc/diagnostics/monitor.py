"""Stability figures of a whole network, taken from outside on a fixed probe batch."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

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

Probe = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""A model's input: its only argument, its positional arguments, or its keyword arguments."""


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

    def __init__(self, probe: Probe) -> None:
        """probe: the model's input, kept for every call; a tuple holds its positional arguments.

        A mapping (a dict, or a tokenizer's batch) holds its keyword arguments. Raises ConfigError
        for anything else.
        """
        if not isinstance(probe, Tensor | tuple | Mapping):
            raise ConfigError(
                "GainMonitor: probe must be a tensor, a tuple of positional arguments or a mapping "
                f"of keyword arguments but is a {type(probe).__name__}; wrap it as (probe,) if it "
                "is the model's only argument"
            )
        self.probe = probe

    def __call__(self, model: nn.Module) -> dict[str, Any]:
        """Lists have one entry a sublayer, in depth order.

        gain_forward, gain_backward: largest composite gain over depth, mean over tokens of gains;
        gains, matrices: the four rows of `AmaxGain` for both token averages;
        composite: token mean of the composite matrices [L, n, n];
        log_column_sum, composite_log_column_sum, stochastic_distance: of single and composite;
        stream_cosine, stream_rank: of the streams that each sublayer met.
        In a pipeline every process reports all sublayers.
        """
        from manifold_hc.parallel import in_depth_order  # imports torch.distributed, for a second

        found = capture(model, self.probe)
        shapes = in_depth_order(model, [(one.sublayer, one.res.shape) for one in found])
        if not shapes:
            raise ConfigError("GainMonitor: the model calls no manifold_hc.Connection")
        if len(set(shapes)) > 1:
            raise ShapeError(
                "GainMonitor: every connection must have the same streams and tokens but res are "
                f"{sorted({tuple(shape) for shape in shapes})}; watch one stack at a time"
            )
        matrices = torch.stack(in_depth_order(model, [(one.sublayer, one.res) for one in found]))
        streams = in_depth_order(
            model,
            [(one.sublayer, (pairwise_cosine(one.x), effective_rank(one.x))) for one in found],
        )
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
            "stream_cosine": [cosine for cosine, _ in streams],
            "stream_rank": [rank for _, rank in streams],
        }


class Captured(NamedTuple):
    """What one connection did."""

    sublayer: int
    res: Float[Tensor, "tokens n n"]
    x: Float[Tensor, "tokens n C"]
    """The streams that it met."""


@torch.no_grad()
def capture(model: nn.Module, probe: Probe) -> list[Captured]:
    """What the connections of this process did, in the order in which the model calls them.

    A connection that is called twice counts twice. What torch.compile has compiled runs eagerly:
    its graphs do not call the hooks that are set after it.
    """
    arguments = (
        probe if isinstance(probe, tuple) else () if isinstance(probe, Mapping) else (probe,)
    )
    keywords = dict(probe) if isinstance(probe, Mapping) else {}
    found: list[Captured] = []

    def keep(sublayer: int, reading: Reading) -> None:
        # On the CPU, because not every device has float64.
        x, res = reading.x.detach().cpu(), reading.res.detach().cpu()
        res, x = res.reshape(-1, *res.shape[-2:]), x.reshape(-1, *x.shape[-2:])
        found.append(Captured(sublayer, res, x))

    handles = [
        module.maps.register_forward_hook(lambda _, given, made, s=module.sublayer: keep(s, made))
        for module in model.modules()
        if isinstance(module, Connection)
    ]
    modes = [(module, module.training) for module in model.modules()]
    devices = {leaf.device for leaf in tree_leaves((arguments, keywords)) if torch.is_tensor(leaf)}
    cuda = [device for device in devices if device.type == "cuda"]
    try:
        with torch.random.fork_rng(devices=cuda), torch.compiler.set_stance("force_eager"):
            model.eval()
            model(*arguments, **keywords)
    finally:
        for module, training in modes:
            module.training = training
        for handle in handles:
            handle.remove()
    return found
