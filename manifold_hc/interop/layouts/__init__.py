"""Layouts of connection tensors in other libraries, and exact conversion between them."""

from manifold_hc.interop.layouts.checkpoint import Checkpoint, open_checkpoint
from manifold_hc.interop.layouts.conventions import conventions
from manifold_hc.interop.layouts.convert import Conversion, convert
from manifold_hc.interop.layouts.layout import Layout
from manifold_hc.interop.layouts.table import LAYOUTS, layout

__all__ = [
    "LAYOUTS",
    "Checkpoint",
    "Conversion",
    "Layout",
    "conventions",
    "convert",
    "layout",
    "open_checkpoint",
]
