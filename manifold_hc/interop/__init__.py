"""Exchange of weights with models of other libraries, and our operators inside them."""

from manifold_hc.interop.acceleration import Acceleration, accelerate
from manifold_hc.interop.deepseek import load_deepseek

__all__ = ["Acceleration", "accelerate", "load_deepseek"]
