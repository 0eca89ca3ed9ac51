"""Language models around the connections."""

from manifold_hc.models.attention import AttentionConfig, LatentAttention
from manifold_hc.models.decoder import Decoder, DecoderConfig
from manifold_hc.models.feed_forward import GatedFeedForward

__all__ = ["AttentionConfig", "Decoder", "DecoderConfig", "GatedFeedForward", "LatentAttention"]
