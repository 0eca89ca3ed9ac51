"""RMS norm of a sublayer's input: `out = u weight / sqrt(mean(u^2) + eps)`."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from manifold_hc.kernels.triton import plan
from manifold_hc.kernels.values import InputNorm


@triton.jit(do_not_specialize=["tokens"])
@no_type_check
def input_norm_kernel(
    u: tl.tensor, weight: tl.tensor, out: tl.tensor, tokens: int, input_eps: float,
    C: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    live = token < tokens
    row = token[:, None] * C
    squares = tl.zeros([BT, BC], tl.float32)
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)[None, :]
        value = tl.load(u + row + c, mask=live[:, None] & (c < C), other=0.0).to(tl.float32)
        squares += value * value
    # 1 / rms(u)
    inverse = tl.rsqrt(tl.sum(squares, 1) / C + input_eps)
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)[None, :]
        mask = live[:, None] & (c < C)
        value = tl.load(u + row + c, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
        value *= inverse[:, None] * gate  # u weight / rms(u)
        tl.store(out + row + c, value.to(out.dtype.element_ty), mask=mask)


def normalised(u: Tensor, norm: InputNorm) -> Tensor:
    """Return u [N, C] / sqrt(mean(u^2) + eps) * weight [C]."""
    tokens, C = u.shape
    out = torch.empty_like(u)
    tile = plan.stream_tile(1, C, u.dtype)
    if tokens:
        with plan.launching(u):
            input_norm_kernel[(plan.blocks(tokens, tile["BT"]),)](
                u, norm.weight, out, tokens, norm.eps, C=C, **tile
            )
    return out
