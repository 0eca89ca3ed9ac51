"""Operator `read`: `u = sum_i pre[i] x[i]`."""

from math import prod
from typing import Any

import torch
from torch import Tensor

from manifold_hc.kernels.arguments import Support
from manifold_hc.kernels.cpu import read as cpu
from manifold_hc.kernels.operator import Operator, fake_input, flattened


class ReadBackward(Operator):
    """Gradients of x and pre."""

    schema = "read_backward(Tensor grad_u, Tensor x, Tensor pre) -> (Tensor, Tensor)"

    def run(self, grad: Tensor, x: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
        """Run the backend's kernel."""
        if self.backend == "cpu":
            return cpu.read_backward(grad, x, pre)
        from manifold_hc.kernels.triton import read as triton

        return triton.read_backward(grad, x, pre)

    def fake(self, grad: Tensor, x: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
        """Return empty results."""
        return torch.empty_like(x), torch.empty_like(pre)


class Read(Operator):
    """u [N, C] of x [N, n, C] and pre [N, n], in x's dtype."""

    schema = "read(Tensor x, Tensor pre) -> Tensor"

    def __init__(self, backend: str, support: Support) -> None:
        self.backward_op = ReadBackward(backend, support)
        super().__init__(backend, support)

    def __call__(self, x: Tensor, pre: Tensor) -> Tensor:
        """Return u [*batch, C] of x [*batch, n, C] and pre [*#batch, n]."""
        *batch, n, C = x.shape
        # pre may broadcast: one row a token for the kernel
        tokens = prod(batch)
        u: Tensor = self.op(x.reshape(tokens, n, C), flattened(pre, batch, tokens, n))
        return u.view(*batch, C)

    def run(self, x: Tensor, pre: Tensor) -> Tensor:
        """Run the backend's kernel."""
        if self.backend == "cpu":
            return cpu.read(x, pre)
        from manifold_hc.kernels.triton import read as triton

        return triton.read(x, pre)

    def fake(self, x: Tensor, pre: Tensor) -> Tensor:
        """Return an empty result."""
        return fake_input(x)

    def save(self, ctx: Any, inputs: Any, output: Tensor) -> None:
        """Save both inputs."""
        ctx.save_for_backward(*inputs)

    def backward(self, ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of x and pre."""
        x, pre = ctx.saved_tensors
        found: tuple[Tensor, Tensor] = self.backward_op.op(grad, x, pre)
        return found
