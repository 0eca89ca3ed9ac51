"""Layouts of connection tensors in other libraries, and exact conversion between them."""

from manifold_hc.interop.layouts.checkpoint import Checkpoint, open_checkpoint
from manifold_hc.interop.layouts.layout import Layout
from manifold_hc.interop.layouts.table import LAYOUTS

__all__ = ["LAYOUTS", "Checkpoint", "Layout", "open_checkpoint"]
