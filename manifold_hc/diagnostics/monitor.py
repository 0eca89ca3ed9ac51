"""Stability figures of a whole network, measured on a fixed probe batch."""

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
    """Runs a probe batch through a model and reports gains and diversity of its streams.

    Forward hooks record the mixing matrices and streams of every connection in the order of the
    calls. Training mode, gradients and random state of the model are unchanged afterwards.

    Example:
        >>> import torch
        >>> import manifold_hc as mhc
        >>> from manifold_hc.diagnostics import GainMonitor
        >>> class Model(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.stack = mhc.Stack(8, mhc.ConnectionConfig(kind="residual"), sublayers=2)
        ...     def forward(self, h):
        ...         return self.stack(h, [torch.sin, torch.cos])
        >>> monitor = GainMonitor(torch.randn(3, 8))
        >>> figures = monitor(Model())
        >>> figures["gain_forward"], figures["gain_backward"]
        (1.0, 1.0)
    """

    name: str = "gain"

    @property
    def shown(self) -> dict[str, str]:
        """Figures of the progress view: label and key of each."""
        return {"gain": "gain_forward", "backward": "gain_backward"}

    def __init__(self, probe: Probe) -> None:
        """Keep a probe batch.

        Args:
            probe: the model's input: a tensor, a tuple of positional arguments, or a mapping (a
                dict, or a tokenizer's batch) of keyword arguments.

        Raises:
            ConfigError: for a probe of another type.
        """
        if not isinstance(probe, Tensor | tuple | Mapping):
            raise ConfigError(
                "GainMonitor: probe must be a tensor, a tuple of positional arguments or a mapping "
                f"of keyword arguments but is a {type(probe).__name__}; wrap it as (probe,) if it "
                "is the model's only argument"
            )
        self.probe = probe

    def __call__(self, model: nn.Module) -> dict[str, Any]:
        """Run the probe batch through `model` and compute its figures.

        Args:
            model: a module with connections in it, all with the same streams and tokens. In a
                pipeline, this process's stages; every process gets the figures of all sublayers.

        Returns:
            A dict. Lists have one entry for each sublayer, in depth order.

            - gain_forward, gain_backward: largest composite gain over depth, mean of the tokens';
            - gains, matrices: the rows of `AmaxGain` for either average over tokens;
            - composite: composite matrices [L, n, n], mean over tokens;
            - log_column_sum, stochastic_distance: of each matrix;
            - composite_log_column_sum: of each composite matrix;
            - stream_cosine, stream_rank: of the streams before each sublayer.

        Raises:
            ConfigError: if the model calls no connection.
            ShapeError: if connections differ in streams or tokens.
        """
        from manifold_hc.parallel import in_depth_order  # imports torch.distributed, for a second

        calls = capture(model, self.probe)
        shapes = in_depth_order(model, [(call.sublayer, call.res.shape) for call in calls])
        if not shapes:
            raise ConfigError("GainMonitor: the model calls no manifold_hc.Connection")
        if len(set(shapes)) > 1:
            raise ShapeError(
                "GainMonitor: every connection must have the same streams and tokens but res are "
                f"{sorted({tuple(shape) for shape in shapes})}; watch one stack at a time"
            )
        matrices = torch.stack(in_depth_order(model, [(call.sublayer, call.res) for call in calls]))
        streams = in_depth_order(
            model,
            [(call.sublayer, (pairwise_cosine(call.x), effective_rank(call.x))) for call in calls],
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
    """Mixing matrices and input streams of one call of a connection."""

    sublayer: int
    res: Float[Tensor, "tokens n n"]
    x: Float[Tensor, "tokens n C"]


@torch.no_grad()
def capture(model: nn.Module, probe: Probe) -> list[Captured]:
    """Record the calls of this process's connections, in the order of the calls.

    A connection that is called twice is recorded twice. Compiled modules run eagerly: a graph of
    torch.compile does not call hooks that are registered after its compilation.
    """
    arguments = (
        probe if isinstance(probe, tuple) else () if isinstance(probe, Mapping) else (probe,)
    )
    keywords = dict(probe) if isinstance(probe, Mapping) else {}
    calls: list[Captured] = []

    def record(sublayer: int, reading: Reading) -> None:
        # On the CPU, because not every device has float64.
        x, res = reading.x.detach().cpu(), reading.res.detach().cpu()
        res, x = res.reshape(-1, *res.shape[-2:]), x.reshape(-1, *x.shape[-2:])
        calls.append(Captured(sublayer, res, x))

    handles = [
        module.maps.register_forward_hook(
            lambda _, x, reading, s=module.sublayer: record(s, reading)
        )
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
    return calls
