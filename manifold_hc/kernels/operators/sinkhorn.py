"""Operator `sinkhorn`: res [N, o, i] of logits [N, n, n]."""

from typing import Any

import torch
from torch import Tensor

from manifold_hc.kernels.arguments import Support
from manifold_hc.kernels.cpu import sinkhorn as cpu
from manifold_hc.kernels.operator import Operator
from manifold_hc.numerics import Numerics

NUMBERS = "int iterations, bool transposed, float hc_eps"


class SinkhornBackward(Operator):
    """Gradient of the finite iteration, its iterates recomputed: [N, n, n]."""

    schema = f"sinkhorn_backward(Tensor grad_res, Tensor logits, {NUMBERS}) -> Tensor"

    def run(
        self, grad: Tensor, logits: Tensor, iterations: int, transposed: bool, hc_eps: float
    ) -> Tensor:
        """Run the backend's kernel."""
        if self.backend == "cpu":
            return cpu.sinkhorn_backward(grad, logits, iterations, transposed, hc_eps)
        from manifold_hc.kernels.triton import sinkhorn as triton

        return triton.sinkhorn_backward(grad, logits, iterations, transposed, hc_eps)

    def fake(
        self, grad: Tensor, logits: Tensor, iterations: int, transposed: bool, hc_eps: float
    ) -> Tensor:
        """Return an empty result."""
        return torch.empty_like(logits)


class Sinkhorn(Operator):
    """Sinkhorn-Knopp; with `transposed` on DeepSeek-V4's `comb`, in its order of steps."""

    schema = f"sinkhorn(Tensor logits, {NUMBERS}) -> Tensor"

    def __init__(self, backend: str, support: Support) -> None:
        self.backward_op = SinkhornBackward(backend, support)
        super().__init__(backend, support)

    def __call__(self, logits: Tensor, iterations: int, numerics: Numerics) -> Tensor:
        """Return res [*batch, o, i] of logits [*batch, n, n]."""
        n = logits.shape[-1]
        flat = logits.reshape(-1, n, n)
        res: Tensor = self.op(flat, iterations, numerics.res_is_transposed, numerics.hc_eps)
        return res.view(logits.shape)

    def run(self, logits: Tensor, iterations: int, transposed: bool, hc_eps: float) -> Tensor:
        """Run the backend's kernel."""
        if self.backend == "cpu":
            return cpu.sinkhorn(logits, iterations, transposed, hc_eps)
        from manifold_hc.kernels.triton import sinkhorn as triton

        return triton.sinkhorn(logits, iterations, transposed, hc_eps)

    def fake(self, logits: Tensor, iterations: int, transposed: bool, hc_eps: float) -> Tensor:
        """Return an empty result."""
        return torch.empty_like(logits)

    def save(self, ctx: Any, inputs: Any, output: Tensor) -> None:
        """Save the logits: iterates are recomputed."""
        # iterations, transposed, hc_eps
        logits, *ctx.numbers = inputs
        ctx.save_for_backward(logits)

    def backward(self, ctx: Any, grad: Tensor) -> tuple[Tensor]:
        """Return the gradient of logits."""
        (logits,) = ctx.saved_tensors
        return (self.backward_op.op(grad, logits, *ctx.numbers),)
