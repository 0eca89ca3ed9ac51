"""Operator `write`: `x'[o] = sum_i res[o, i] x[i] + post[o] y`."""

from math import prod
from typing import Any

import torch
from torch import Tensor

from manifold_hc.kernels.arguments import Support
from manifold_hc.kernels.cpu import write as cpu
from manifold_hc.kernels.operator import Operator, flattened


class WriteBackward(Operator):
    """Gradients of x, y, post and res."""

    schema = (
        "write_backward(Tensor grad_written, Tensor x, Tensor y, Tensor post, Tensor res)"
        " -> (Tensor, Tensor, Tensor, Tensor)"
    )

    def run(
        self, grad: Tensor, x: Tensor, y: Tensor, post: Tensor, res: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Run the backend's kernel."""
        if self.backend == "cpu":
            return cpu.write_backward(grad, x, y, post, res)
        from manifold_hc.kernels.triton import write as triton

        return triton.write_backward(grad, x, y, post, res)

    def fake(
        self, grad: Tensor, x: Tensor, y: Tensor, post: Tensor, res: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return empty results."""
        empty = torch.empty_like
        return empty(x), empty(y), empty(post), empty(res)


class BranchBackward(Operator):
    """Gradients of y and post alone, for a write under a link."""

    schema = "branch_backward(Tensor grad_written, Tensor y, Tensor post) -> (Tensor, Tensor)"

    def run(self, grad: Tensor, y: Tensor, post: Tensor) -> tuple[Tensor, Tensor]:
        """Run the backend's kernel."""
        if self.backend == "cpu":
            return cpu.branch_backward(grad, y, post)
        from manifold_hc.kernels.triton import write as triton

        return triton.branch_backward(grad, y, post)

    def fake(self, grad: Tensor, y: Tensor, post: Tensor) -> tuple[Tensor, Tensor]:
        """Return empty results."""
        return torch.empty_like(y), torch.empty_like(post)


class Write(Operator):
    """x' [N, n, C] of x [N, n, C], y [N, C], post [N, n] and res [N, o, i], in x's dtype.

    With a link, this operator returns no gradients for x and res: the backward of the coefficients
    computes them (`operator.grad_carrier`).
    """

    schema = "write(Tensor x, Tensor y, Tensor post, Tensor res, Tensor? link) -> Tensor"

    def __init__(self, backend: str, support: Support) -> None:
        self.backward_op = WriteBackward(backend, support)
        self.branch_backward_op = BranchBackward(backend, support)
        super().__init__(backend, support)

    def __call__(
        self, x: Tensor, y: Tensor, post: Tensor, res: Tensor, link: Tensor | None = None
    ) -> Tensor:
        """Return x' [*batch, n, C]; post and res broadcast to the batch."""
        *batch, n, C = x.shape
        tokens = prod(batch)
        written: Tensor = self.op(
            x.reshape(tokens, n, C),
            y.reshape(tokens, C),
            flattened(post, batch, tokens, n),
            flattened(res, batch, tokens, n, n),
            link,
        )
        return written.view(x.shape)

    def run(self, x: Tensor, y: Tensor, post: Tensor, res: Tensor, link: Tensor | None) -> Tensor:
        """Run the backend's kernel, which needs no link."""
        if self.backend == "cpu":
            return cpu.write(x, y, post, res)
        from manifold_hc.kernels.triton import write as triton

        return triton.write(x, y, post, res)

    def fake(self, x: Tensor, y: Tensor, post: Tensor, res: Tensor, link: Tensor | None) -> Tensor:
        """Return an empty result."""
        return torch.empty_like(x)

    def save(self, ctx: Any, inputs: Any, output: Tensor) -> None:
        """Save all inputs, or y and post alone under a link."""
        x, y, post, res, link = inputs
        ctx.is_linked = link is not None
        if ctx.is_linked:
            ctx.save_for_backward(y, post)
        else:
            ctx.save_for_backward(x, y, post, res)

    def backward(self, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, y, post, res and link."""
        if ctx.is_linked:
            y, post = ctx.saved_tensors
            dy, dpost = self.branch_backward_op.op(grad, y, post)
            # The link passes g on: the coefficients make dx = res^T g and dres = <g, x>.
            return None, dy, dpost, None, grad
        x, y, post, res = ctx.saved_tensors
        dx, dy, dpost, dres = self.backward_op.op(grad, x, y, post, res)
        return dx, dy, dpost, dres, None
