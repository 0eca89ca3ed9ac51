"""Training data: from text to batches of token ids."""

from manifold_hc.extras import require_train

require_train("manifold_hc.data")

from manifold_hc.data.batches import Batch, Batches
from manifold_hc.data.config import DataConfig
from manifold_hc.data.corpus import Corpus
from manifold_hc.data.loading import load

__all__ = ["Batch", "Batches", "Corpus", "DataConfig", "load"]
