"""Operators `coefficients` and `coefficients_and_read`: the maps of every token, and their read."""

from math import prod
from typing import Any

import torch
from torch import Tensor

from manifold_hc.kernels.arguments import Support
from manifold_hc.kernels.cpu import boundary as cpu
from manifold_hc.kernels.operator import (
    Operator,
    fake_carrier,
    fake_input,
    fake_maps,
    grad_carrier,
    unflattened,
)
from manifold_hc.kernels.values import (
    MAPS,
    READING_GRADIENTS,
    SAVED_MAPS,
    SETTINGS,
    MapParameters,
    ReadingGradients,
    SavedMaps,
    Settings,
)

FourGradients = tuple[Tensor, Tensor, Tensor, Tensor]


class CoefficientsAndReadBackward(Operator):
    """Gradients of x, phi, alpha and bias; `grad_link`: of the streams written next."""

    schema = (
        f"coefficients_and_read_backward({READING_GRADIENTS}, Tensor x, {MAPS}, {SAVED_MAPS}, "
        f"{SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor)"
    )

    def run(
        self,
        grads: ReadingGradients,
        x: Tensor,
        maps: MapParameters,
        saved: SavedMaps,
        settings: Settings,
    ) -> FourGradients:
        """Run the backend's kernel."""
        if self.backend == "cpu":
            return cpu.coefficients_and_read_backward(grads, x, maps, saved, settings)
        from manifold_hc.kernels.triton import coefficients_backward as triton

        return triton.coefficients_and_read_backward(grads, x, maps, saved, settings)

    def fake(
        self,
        grads: ReadingGradients,
        x: Tensor,
        maps: MapParameters,
        saved: SavedMaps,
        settings: Settings,
    ) -> FourGradients:
        """Return empty results."""
        empty = torch.empty_like
        return empty(x), empty(maps.phi), empty(maps.alpha), empty(maps.bias)


class CoefficientsAndRead(Operator):
    """u [N, C], `ComputedMaps` of the streams x [N, n, C], and the carrier of a link."""

    schema = (
        f"coefficients_and_read(Tensor x, {MAPS}, {SETTINGS})"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    )

    def __init__(self, backend: str, support: Support) -> None:
        self.backward_op = CoefficientsAndReadBackward(backend, support)
        super().__init__(backend, support)

    def __call__(
        self, x: Tensor, maps: MapParameters, settings: Settings
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return (pre, post, res, u, grad_carrier) of x [*batch, n, C]."""
        *batch, n, C = x.shape
        # Projections and 1 / rms are results for the backward pass alone.
        u, pre, post, res, _, _, link = self.op(x.reshape(prod(batch), n, C), *maps, *settings)
        pre, post, res, u = unflattened(batch, (pre, post, res, u))
        return pre, post, res, u, link

    def run(self, x: Tensor, maps: MapParameters, settings: Settings) -> tuple[Tensor, ...]:
        """Run the backend's kernel."""
        if self.backend == "cpu":
            u, made = cpu.coefficients_and_read(x, maps, settings)
            return (u, *made, grad_carrier(x))
        from manifold_hc.kernels.triton import coefficients as triton

        u, made = triton.coefficients_and_read(x, maps, settings)
        return (u, *made, grad_carrier(x))

    def fake(self, x: Tensor, maps: MapParameters, settings: Settings) -> tuple[Tensor, ...]:
        """Return empty results."""
        return (fake_input(x), *fake_maps(x, maps.phi), fake_carrier(x))

    def save(self, ctx: Any, inputs: Any, output: Any) -> None:
        """Save the inputs, res and the projections."""
        x, maps, ctx.settings = inputs
        _, _, _, res, projected, inverse_rms, _ = output
        ctx.mark_non_differentiable(projected, inverse_rms)
        # None instead of zeros for results without a gradient: kernels skip them.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *maps, res, projected, inverse_rms)

    def backward(
        self,
        ctx: Any,
        u: Tensor | None,
        pre: Tensor | None,
        post: Tensor | None,
        res: Tensor | None,
        _projected: Tensor | None,
        _inverse_rms: Tensor | None,
        link: Tensor | None,
    ) -> FourGradients:
        """Return the gradients of x, phi, alpha and bias."""
        grads = ReadingGradients(u, pre, post, res, link)
        found: FourGradients = self.backward_op.op(*grads, *ctx.saved_tensors, *ctx.settings)
        return found


class Coefficients(Operator):
    """`ComputedMaps` of x [N, n, C], bitwise equal to those of `coefficients_and_read`."""

    schema = (
        f"coefficients(Tensor x, {MAPS}, {SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    )

    def __init__(
        self, backend: str, support: Support, backward_op: CoefficientsAndReadBackward
    ) -> None:
        self.backward_op = backward_op
        super().__init__(backend, support)

    def __call__(
        self, x: Tensor, maps: MapParameters, settings: Settings
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (pre, post, res) of x [*batch, n, C]."""
        *batch, n, C = x.shape
        pre, post, res, _, _ = self.op(x.reshape(prod(batch), n, C), *maps, *settings)
        pre, post, res = unflattened(batch, (pre, post, res))
        return pre, post, res

    def run(self, x: Tensor, maps: MapParameters, settings: Settings) -> tuple[Tensor, ...]:
        """Run the backend's kernel."""
        if self.backend == "cpu":
            return tuple(cpu.coefficients(x, maps, settings))
        from manifold_hc.kernels.triton import coefficients as triton

        return tuple(triton.coefficients(x, maps, settings))

    def fake(self, x: Tensor, maps: MapParameters, settings: Settings) -> tuple[Tensor, ...]:
        """Return empty results."""
        return fake_maps(x, maps.phi)

    def save(self, ctx: Any, inputs: Any, output: Any) -> None:
        """Save the inputs, res and the projections."""
        x, maps, ctx.settings = inputs
        _, _, res, projected, inverse_rms = output
        ctx.mark_non_differentiable(projected, inverse_rms)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *maps, res, projected, inverse_rms)

    def backward(
        self,
        ctx: Any,
        pre: Tensor | None,
        post: Tensor | None,
        res: Tensor | None,
        _projected: Tensor | None,
        _inverse_rms: Tensor | None,
    ) -> FourGradients:
        """Return the gradients of x, phi, alpha and bias."""
        # This operator returns no u and no link: the kernel omits their terms of dx and dres.
        grads = ReadingGradients(u=None, pre=pre, post=post, res=res, link=None)
        found: FourGradients = self.backward_op.op(*grads, *ctx.saved_tensors, *ctx.settings)
        return found
