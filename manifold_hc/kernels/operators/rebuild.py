"""Operator `rebuild`: streams and inputs of a recompute block, without running its branches."""

from collections.abc import Sequence
from functools import reduce
from math import prod

import torch
from torch import Tensor

from manifold_hc.kernels.cpu import rebuild as cpu
from manifold_hc.kernels.operator import Operator, fake_input, flattened
from manifold_hc.kernels.values import InputNorm, norm_or_none

Rebuilt = tuple[list[Tensor], list[Tensor]]


class Rebuild(Operator):
    """The streams after each write (y, post, res), and the input of each read (pre).

    The first read reads x [N, n, C], and the first write mixes it; there is one write fewer. All y
    have one dtype. The bits are those of `write`, `read` and `boundary`. It has no derivative.
    """

    schema = (
        "rebuild(Tensor x, Tensor[] y, Tensor[] post, Tensor[] res, Tensor[] pre, "
        "Tensor?[] weight, float[] input_eps) -> (Tensor[], Tensor[])"
    )

    def __call__(
        self,
        x: Tensor,
        writes: Sequence[tuple[Tensor, Tensor, Tensor]],
        reads: Sequence[Tensor],
        norms: Sequence[InputNorm | None],
    ) -> Rebuilt:
        """Return streams [*batch, n, C] and inputs [*batch, C]."""
        *batch, n, C = x.shape
        tokens = prod(batch)
        # The kernel takes one dtype of y; a wider one holds the same numbers.
        dtypes = [y.dtype for y, _, _ in writes] or [x.dtype]
        dtype = reduce(torch.promote_types, dtypes)
        streams, inputs = self.op(
            x.reshape(tokens, n, C),
            [y.to(dtype).reshape(tokens, C) for y, _, _ in writes],
            [flattened(post, batch, tokens, n) for _, post, _ in writes],
            [flattened(res, batch, tokens, n, n) for _, _, res in writes],
            [flattened(pre, batch, tokens, n) for pre in reads],
            [None if norm is None else norm.weight for norm in norms],
            [0.0 if norm is None else norm.eps for norm in norms],
        )
        return [s.view(x.shape) for s in streams], [u.view(*batch, C) for u in inputs]

    def run(
        self,
        x: Tensor,
        y: list[Tensor],
        post: list[Tensor],
        res: list[Tensor],
        pre: list[Tensor],
        weight: list[Tensor | None],
        eps: list[float],
    ) -> Rebuilt:
        """Run the backend's kernel."""
        writes = list(zip(y, post, res, strict=True))
        norms = [norm_or_none(pair) for pair in zip(weight, eps, strict=True)]
        if self.backend == "cpu":
            return cpu.rebuild(x, writes, pre, norms)
        from manifold_hc.kernels.triton import rebuild as triton

        return triton.rebuild(x, writes, pre, norms)

    def fake(
        self,
        x: Tensor,
        y: list[Tensor],
        post: list[Tensor],
        res: list[Tensor],
        pre: list[Tensor],
        weight: list[Tensor | None],
        eps: list[float],
    ) -> Rebuilt:
        """Return empty results."""
        return [torch.empty_like(x) for _ in y], [fake_input(x) for _ in pre]
