"""Manifold-constrained hyper-connections for PyTorch: `import manifold_hc as mhc`."""

from manifold_hc import diagnostics, functional
from manifold_hc.config import ConnectionConfig
from manifold_hc.connection import Connection
from manifold_hc.stack import Stack
from manifold_hc.warmup import warmup

__version__ = "0.1.0"

__all__ = ["Connection", "ConnectionConfig", "Stack", "diagnostics", "functional", "warmup"]
