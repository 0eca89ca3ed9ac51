"""Operator `boundary`: the write of one sublayer, the coefficients and the read of the next."""

from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manifold_hc.kernels.arguments import Support
from manifold_hc.kernels.cpu import boundary as cpu
from manifold_hc.kernels.operator import (
    Operator,
    fake_carrier,
    fake_input,
    fake_maps,
    flattened,
    grad_carrier,
    unflattened,
)
from manifold_hc.kernels.operators.write import WriteBackward
from manifold_hc.kernels.values import (
    MAPS,
    NORM,
    READING_GRADIENTS,
    SAVED_BOUNDARY,
    SAVED_MAPS,
    SETTINGS,
    BoundaryGradients,
    InputNorm,
    MapParameters,
    ReadingGradients,
    SavedBoundary,
    SavedMaps,
    Settings,
    WriteInputs,
)


class BoundaryBackward(Operator):
    """`BoundaryGradients`. post: of the write; saved: of the coefficients that follow it."""

    schema = (
        f"boundary_backward(Tensor? grad_written, {READING_GRADIENTS}, "
        f"{SAVED_BOUNDARY}, {MAPS}, {NORM}, {SAVED_MAPS}, "
        f"{SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    )

    def run(
        self,
        grad_written: Tensor | None,
        grads: ReadingGradients,
        boundary: SavedBoundary,
        maps: MapParameters,
        norm: InputNorm | None,
        saved: SavedMaps,
        settings: Settings,
    ) -> tuple[Tensor, ...]:
        """Run the backend's kernel."""
        if self.backend == "cpu":
            return cpu.boundary_backward(grad_written, grads, boundary, maps, norm, saved, settings)
        from manifold_hc.kernels.triton import coefficients_backward as triton

        return triton.boundary_backward(grad_written, grads, boundary, maps, norm, saved, settings)

    def fake(
        self,
        grad_written: Tensor | None,
        grads: ReadingGradients,
        boundary: SavedBoundary,
        maps: MapParameters,
        norm: InputNorm | None,
        saved: SavedMaps,
        settings: Settings,
    ) -> tuple[Tensor, ...]:
        """Return empty results."""
        weight = None if norm is None else norm.weight
        inputs = (*boundary, *maps, weight)
        return tuple(
            boundary.written.new_empty(0) if t is None else torch.empty_like(t) for t in inputs
        )


class BoundaryResult(NamedTuple):
    """Written streams, and the reading of the next sublayer; `Reading` has them for the user."""

    written: Tensor
    pre: Tensor
    post: Tensor
    res: Tensor
    u: Tensor
    grad_carrier: Tensor


class Boundary(Operator):
    """Written streams [N, n, C], u [N, C], their `ComputedMaps`, and the carrier of a link.

    `pre`: read weights [N, n], the new ones where it is None. With a norm u is normalised.
    """

    schema = (
        "boundary(Tensor x, Tensor y, Tensor post, Tensor res, Tensor? pre, Tensor? link, "
        f"{MAPS}, {NORM}, {SETTINGS})"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    )

    def __init__(self, backend: str, support: Support, write_backward_op: WriteBackward) -> None:
        self.backward_op = BoundaryBackward(backend, support)
        self.write_backward_op = write_backward_op
        super().__init__(backend, support)

    def __call__(
        self,
        write: WriteInputs,
        pre: Tensor | None,
        link: Tensor | None,
        maps: MapParameters,
        norm: InputNorm | None,
        settings: Settings,
    ) -> BoundaryResult:
        """Return the results in the batch's shape; post, res and pre broadcast to it."""
        *batch, n, C = write.x.shape
        tokens = prod(batch)
        weight, eps = (None, 0.0) if norm is None else norm
        written, u, new_pre, new_post, new_res, _, _, carrier = self.op(
            write.x.reshape(tokens, n, C),
            write.y.reshape(tokens, C),
            flattened(write.post, batch, tokens, n),
            flattened(write.res, batch, tokens, n, n),
            None if pre is None else flattened(pre, batch, tokens, n),
            link,
            *maps,
            weight,
            eps,
            *settings,
        )
        new_pre, new_post, new_res, u = unflattened(batch, (new_pre, new_post, new_res, u))
        written = written.view(write.x.shape)
        return BoundaryResult(written, new_pre, new_post, new_res, u, carrier)

    def run(
        self,
        x: Tensor,
        y: Tensor,
        post: Tensor,
        res: Tensor,
        pre: Tensor | None,
        link: Tensor | None,
        maps: MapParameters,
        norm: InputNorm | None,
        settings: Settings,
    ) -> tuple[Tensor, ...]:
        """Run the backend's kernel, which needs no link."""
        write = WriteInputs(x, y, post, res)
        if self.backend == "cpu":
            written, u, made = cpu.boundary(write, pre, maps, norm, settings)
            return (written, u, *made, grad_carrier(x))
        from manifold_hc.kernels.triton import boundary as triton

        written, u, made = triton.boundary(write, pre, maps, norm, settings)
        return (written, u, *made, grad_carrier(x))

    def fake(
        self,
        x: Tensor,
        y: Tensor,
        post: Tensor,
        res: Tensor,
        pre: Tensor | None,
        link: Tensor | None,
        maps: MapParameters,
        norm: InputNorm | None,
        settings: Settings,
    ) -> tuple[Tensor, ...]:
        """Return empty results."""
        return torch.empty_like(x), fake_input(x), *fake_maps(x, maps.phi), fake_carrier(x)

    def save(self, ctx: Any, inputs: Any, output: Any) -> None:
        """Save the inputs, without x and res under a link, and the new maps."""
        x, y, post, res, pre, link, maps, norm, ctx.settings = inputs
        written, _, _, _, new_res, projected, inverse_rms, _ = output
        weight, ctx.input_eps = (None, 0.0) if norm is None else norm
        # Under a link the backward of the coefficients makes dx and dres.
        if link is not None:
            x = res = None
        saved = SavedMaps(new_res, projected, inverse_rms)
        ctx.mark_non_differentiable(projected, inverse_rms)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, res, written, y, post, pre, *maps, weight, *saved)

    def backward(
        self,
        ctx: Any,
        grad_written: Tensor | None,
        u: Tensor | None,
        pre: Tensor | None,
        post: Tensor | None,
        res: Tensor | None,
        _projected: Tensor | None,
        _inverse_rms: Tensor | None,
        link: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, y, post, res, pre, link, phi, alpha, bias and weight."""
        grads = ReadingGradients(u, pre, post, res, link)
        x, write_res, written, y, write_post, read_pre, phi, alpha, bias, weight, *saved = (
            ctx.saved_tensors
        )
        found = BoundaryGradients(
            *self.backward_op.op(
                grad_written, *grads, written, y, write_post, read_pre, phi, alpha, bias,
                weight, ctx.input_eps, *saved, *ctx.settings,
            )
        )  # fmt: skip
        dx, dy, dpost, dres, dlink = None, found.y, found.post, None, None
        if x is None:
            dlink = found.written  # g: the coefficients before the write make res^T g and <g, x>
        else:
            # dx = res^T g, dy = <post, g>, dpost = <g, y>, dres = <g, x>
            dx, dy, dpost, dres = self.write_backward_op.op(
                found.written, x, y, write_post, write_res
            )
        dpre = None if read_pre is None else found.pre
        dweight = None if weight is None else found.weight
        return dx, dy, dpost, dres, dpre, dlink, found.phi, found.alpha, found.bias, dweight
