"""Operator `project`: `v phi^T / rms(v)`, the RMS-normalised projections of the streams."""

from math import prod
from typing import Any

import torch
from torch import Tensor

from manifold_hc.kernels.arguments import Support
from manifold_hc.kernels.cpu import project as cpu
from manifold_hc.kernels.operator import Operator


class ProjectBackward(Operator):
    """Gradients of v, in v's dtype, and of phi."""

    schema = (
        "project_backward(Tensor grad_projected, Tensor v, Tensor phi, Tensor projected, "
        "Tensor inverse_rms) -> (Tensor, Tensor)"
    )

    def run(
        self, grad: Tensor, v: Tensor, phi: Tensor, projected: Tensor, inverse_rms: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run the backend's kernel."""
        if self.backend == "cpu":
            return cpu.project_backward(grad, v, phi, projected, inverse_rms)
        from manifold_hc.kernels.triton import project as triton

        return triton.project_backward(grad, v, phi, projected, inverse_rms)

    def fake(
        self, grad: Tensor, v: Tensor, phi: Tensor, projected: Tensor, inverse_rms: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return empty results."""
        return torch.empty_like(v), torch.empty_like(phi)


class Project(Operator):
    """`v phi^T / rms(v)` [N, R] and 1 / rms(v) [N] of v [N, K], phi [R, K]."""

    schema = "project(Tensor v, Tensor phi, float norm_eps) -> (Tensor, Tensor)"

    def __init__(self, backend: str, support: Support) -> None:
        self.backward_op = ProjectBackward(backend, support)
        super().__init__(backend, support)

    def __call__(self, x: Tensor, phi: Tensor, norm_eps: float) -> Tensor:
        """Return the projections [*batch, R] of x [*batch, n, C], v = vec(x)."""
        # v = vec(x): all streams of a token in one row
        v = x.reshape(prod(x.shape[:-2]), phi.shape[-1])
        projected, _ = self.op(v, phi, norm_eps)
        result: Tensor = projected.view(*x.shape[:-2], phi.shape[0])
        return result

    def run(self, v: Tensor, phi: Tensor, norm_eps: float) -> tuple[Tensor, Tensor]:
        """Run the backend's kernel."""
        if self.backend == "cpu":
            return cpu.project(v, phi, norm_eps)
        from manifold_hc.kernels.triton import project as triton

        return triton.project(v, phi, norm_eps)

    def fake(self, v: Tensor, phi: Tensor, norm_eps: float) -> tuple[Tensor, Tensor]:
        """Return empty results."""
        return phi.new_empty(v.shape[0], phi.shape[0]), phi.new_empty(v.shape[0])

    def save(self, ctx: Any, inputs: Any, output: Any) -> None:
        """Save v and phi with both results."""
        v, phi, _ = inputs
        projected, inverse_rms = output
        ctx.mark_non_differentiable(inverse_rms)
        ctx.save_for_backward(v, phi, projected, inverse_rms)

    def backward(self, ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the gradients of v and phi."""
        found: tuple[Tensor, Tensor] = self.backward_op.op(grad, *ctx.saved_tensors)
        return found
