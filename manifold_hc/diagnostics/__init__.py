"""Stability figures of a model: gain magnitudes and diversity of the streams."""

from manifold_hc.diagnostics.gain import (
    AmaxGain,
    amax_gain,
    composites,
    log_column_sum,
    stochastic_distance,
)
from manifold_hc.diagnostics.monitor import GainMonitor
from manifold_hc.diagnostics.streams import effective_rank, pairwise_cosine

__all__ = [
    "AmaxGain",
    "GainMonitor",
    "amax_gain",
    "composites",
    "effective_rank",
    "log_column_sum",
    "pairwise_cosine",
    "stochastic_distance",
]
