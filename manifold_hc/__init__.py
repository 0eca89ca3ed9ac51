"""Manifold-constrained hyper-connections (mHC) for PyTorch: `import manifold_hc as mhc`.

A residual stream of n parallel copies, the streams, replaces the residual connection. Before a
sublayer, `pre` weights reduce the streams to its input; after it, `post` weights add its output to
the streams, which the doubly stochastic matrix `res` mixes (arXiv 2512.24880).

    Stack: the connections of a whole network, [..., C] -> [..., C].
    Connection: the connection of one sublayer, [..., n, C] -> [..., n, C].
    ConnectionConfig: kind (residual, hc or mhc), streams, constraint, numerics, backend.
    functional: the operators alone: expand, coefficients, sinkhorn, read, write, collapse.
    convert: hyper-connections for a pretrained model, which computes the same as before.
    diagnostics: stability figures: gain magnitudes and diversity of the streams.
    warmup: compile the kernels of a run before it starts.
    load: the model and the tokenizer of a run folder.

Example:
    >>> import torch
    >>> import manifold_hc as mhc
    >>> branches = [torch.nn.Linear(16, 16) for _ in range(4)]
    >>> stack = mhc.Stack(16, mhc.ConnectionConfig(kind="mhc", streams=4), sublayers=4)
    >>> stack(torch.randn(2, 8, 16), branches).shape
    torch.Size([2, 8, 16])
"""

from manifold_hc import diagnostics, functional
from manifold_hc.config import ConnectionConfig
from manifold_hc.connection import Connection
from manifold_hc.interop.loading import load
from manifold_hc.interop.retrofit import convert
from manifold_hc.stack import Stack
from manifold_hc.warmup import warmup

__version__ = "0.1.0"

__all__ = [
    "Connection",
    "ConnectionConfig",
    "Stack",
    "convert",
    "diagnostics",
    "functional",
    "load",
    "warmup",
]


def __dir__() -> list[str]:
    """List the public names only; submodules remain attributes once they are imported."""
    return sorted(__all__) + [name for name in globals() if name.startswith("__")]
