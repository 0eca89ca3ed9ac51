"""One observation with the parameters that it should follow: which conventions explain it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from manifold_hc.maps import LearnedExit, Maps, first_read_weights
from manifold_hc.stack import Stack
from manifold_hc.verify.conventions import Convention, Projection, Weights, project, read, write
from manifold_hc.verify.observation import EXIT, Observation


@dataclass(frozen=True)
class Evidence:
    """Results of one sublayer or of the exit, their tolerances, and the stack's parameters."""

    observation: Observation
    tolerances: Mapping[str, float]
    weights: Weights | None
    """None for an exit without parameters."""
    before: "Evidence | None"
    """The sublayer before it in depth order."""
    single_pass: bool

    def excess(self, convention: Convention) -> float:
        """Return the largest error as a multiple of its tolerance; infinite if not computable."""
        predicted = self._predict(convention)
        if predicted.keys() != self.tolerances.keys():
            return math.inf
        return max(
            (
                relative_error(self.observation.results[name], predicted[name]) / tolerance
                for name, tolerance in self.tolerances.items()
            ),
            default=0.0,
        )

    @cached_property
    def projection(self) -> Projection:
        """Projection of this sublayer's streams by its phi."""
        return project(self.observation.inputs.x.double(), cast(Weights, self.weights))

    def _predict(self, convention: Convention) -> dict[str, Tensor]:
        """Compute the results that have a tolerance; one that is not computable is left out."""
        x, y = self.observation.inputs
        x = x.double()
        if self.observation.index == EXIT:
            h = self._exit(x, convention)
            return {} if h is None else {"h": h}
        maps = convention.maps(self.projection, cast(Weights, self.weights))
        found = {name: value for name, value in maps._asdict().items() if name in self.tolerances}
        if "u" in self.tolerances:
            weights = self._read_weights(maps.pre, convention)
            found |= {} if weights is None else {"u": read(x, weights)}
        if "new" in self.tolerances:
            found["new"] = write(x, cast(Tensor, y).double(), maps.post, maps.res)
        return found

    def _read_weights(self, pre: Tensor, convention: Convention) -> Tensor | None:
        if not self.single_pass:
            return pre
        if self.observation.index == 0:
            return first_read_weights(pre)
        return self._previous_pre(convention)

    def _previous_pre(self, convention: Convention) -> Tensor | None:
        if self.before is None or self.before.weights is None:
            return None
        return convention.maps(self.before.projection, self.before.weights).pre

    def _exit(self, x: Tensor, convention: Convention) -> Tensor | None:
        if convention.exit == "mean":
            return x.mean(-2)
        if convention.exit == "sum":
            return x.sum(-2)
        if convention.exit == "pre":
            weights = self._previous_pre(convention)
        elif self.weights is None:
            weights = None
        else:
            weights = convention.exit_weights(self.projection, self.weights)
        return None if weights is None else read(x, weights)


def weights_of(stack: Stack, index: int) -> Weights | None:
    """Return the parameters of a sublayer or of the exit in float64; None if it has none."""
    module = stack.exit if index == EXIT else getattr(stack.connections[index], "maps", None)
    if not isinstance(module, LearnedExit | Maps) or module.phi is None:
        return None
    return Weights(*(p.detach().cpu().double() for p in (module.phi, module.alpha, module.bias)))


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Return the largest error of a token over its largest wanted entry; infinite for NaN."""
    if found.shape != wanted.shape:
        return math.inf
    wide = wanted.double().flatten(1)
    scale = wide.abs().amax(1).clamp_min(torch.finfo(torch.float64).tiny)
    error = float(((found.double().flatten(1) - wide).abs().amax(1) / scale).max())
    return math.inf if math.isnan(error) else error
