"""Text to batches of tokens."""

from manifold_hc.data.batches import Batches, Split
from manifold_hc.data.corpus import documentation, load

__all__ = ["Batches", "Split", "documentation", "load"]
