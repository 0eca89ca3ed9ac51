"""Language models built from connections, attention and feed-forward layers."""

from manifold_hc.models.attention import AttentionConfig, LatentAttention
from manifold_hc.models.cache import LatentCache
from manifold_hc.models.decoder import Decoder, DecoderConfig, ParameterCount, count_parameters
from manifold_hc.models.experts import Experts, ExpertsConfig, balance, mixtures
from manifold_hc.models.feed_forward import GatedFeedForward

__all__ = [
    "AttentionConfig",
    "Decoder",
    "DecoderConfig",
    "Experts",
    "ExpertsConfig",
    "GatedFeedForward",
    "LatentAttention",
    "LatentCache",
    "ParameterCount",
    "balance",
    "count_parameters",
    "mixtures",
]
