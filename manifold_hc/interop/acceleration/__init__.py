"""Our operators behind the modules of a transformers model: one call, reversible."""

from manifold_hc.interop.acceleration.handle import Acceleration, accelerate

__all__ = ["Acceleration", "accelerate"]
