"""Interface of a reference implementation: one sublayer or exit on given tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from manifold_hc.config import ConnectionConfig
from manifold_hc.numerics import NumericsName
from manifold_hc.verify.interpreted import Result, interpreted

Tensors = Mapping[str, Tensor]
"""Parameters of one sublayer or of the exit, by the last part of their names in the layout."""


@dataclass(frozen=True)
class Implementation:
    """A library's own code for one configuration, differentiable in all tensors."""

    sublayer: Callable[[int, Tensors, Tensor, Tensor], dict[str, Tensor]]
    """(index, parameters, x [N, n, C], y [N, C]) -> any of pre, post, res, u and new."""
    exit: Callable[[Tensors, Tensor], Tensor] | None
    """(parameters, x [N, n, C]) -> h [N, C]; None where the library leaves it to its users."""


@dataclass(frozen=True)
class Library:
    """A package whose code is the reference implementation of a layout."""

    package: str
    """Name of the distribution."""
    part: str
    """Part of the package that computes the connections."""
    layout: str
    """Layout of its parameters."""
    build: Callable[[ConnectionConfig, int], Implementation]
    """(configuration, channels) -> its code; MissingExtraError or ConfigError where it cannot run.
    """
    precision: torch.dtype = torch.float64
    """Dtype in which its code computes here."""
    numerics: NumericsName = "deepseek_v4"
    """Preset that its defaults are."""
    in_triton: bool = False
    """True if its code is Triton kernels, which a process of its own interprets."""
    streams: tuple[int, ...] = ()
    """Numbers of streams that it takes; empty for any."""

    def run(self, function: Callable[..., Result], *args: Any) -> Result:
        """Call a function that builds and runs this library's code, where that can run."""
        return interpreted(function, *args) if self.in_triton else function(*args)

    @property
    def version(self) -> str | None:
        """Installed version; None where the package is missing."""
        try:
            return metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return None
