"""Exchange of weights with models of other libraries."""

from manifold_hc.interop.deepseek import load_deepseek

__all__ = ["load_deepseek"]
