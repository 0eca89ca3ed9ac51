"""Peers that need a GPU; nothing here is imported before one of them is built."""

from functools import partial

import torch
from torch import Tensor

from manifold_hc import reference
from manifold_hc.bench.peers.implementations import Candidate, quiet, without_branch
from manifold_hc.bench.problem import Inputs, Problem, reference_step
from manifold_hc.connection import Branch
from manifold_hc.numerics import preset

ITERATIONS = 20
"""Sinkhorn-Knopp iterations, as everywhere."""


def liger(problem: Problem, inputs: Inputs) -> Candidate:
    """Liger-Kernel's three operators, with DeepSeek-V4's epsilons.

    `phi` is ours transposed, in the streams' dtype as its authors advise; `comb` mixes untransposed
    there, so its res is the transpose of V4's.
    """
    with quiet():
        from liger_kernel.transformers import functional
    numerics = preset("deepseek_v4")
    phi = inputs.phi.mT.to(problem.torch_dtype).contiguous().requires_grad_()
    bias = inputs.bias.clone().requires_grad_()
    alphas = tuple(alpha.clone().requires_grad_() for alpha in inputs.alpha.unbind())

    def connect(x: Tensor, branch: Branch) -> Tensor:
        pre, post, res = functional.liger_mhc_coeffs(
            x,
            phi,
            bias,
            *alphas,
            allow_fp32=True,
            tmax=ITERATIONS,
            rms_eps=numerics.norm_eps,
            pre_eps=numerics.hc_eps,
            sinkhorn_eps=numerics.hc_eps,
        )
        u = functional.liger_mhc_pre(x, pre)
        new: Tensor = functional.liger_mhc_post_res(x, branch(u), post, res)
        return new

    return Candidate(
        name="liger-kernel",
        connect=connect,
        step=without_branch(connect),
        parameters=(phi, bias, *alphas),
        oracle=untransposed,
        note="its res is the transpose of DeepSeek-V4's",
    )


def untransposed(
    x: Tensor, y: Tensor, phi: Tensor, bias: Tensor, *alphas: Tensor
) -> tuple[Tensor, Tensor]:
    """(u, x') by Liger-Kernel's equations, on our reference."""
    pre, post, res = reference.coefficients(
        x, phi.mT, torch.stack(alphas), bias, ITERATIONS, "sinkhorn", preset("deepseek_v4")
    )
    return reference.read(x, pre), reference.write(x, y, post, res.mT)


def tile_kernels(problem: Problem, inputs: Inputs) -> Candidate:
    """DeepSeek's TileKernels: parameters as ours, n = 4 and bfloat16 only.

    V4's 20 iterations and its factor 2, where its own defaults are 10 and 1.
    """
    with quiet():
        from tile_kernels.modeling.mhc import functional
    numerics = preset("deepseek_v4")
    parameters = tuple(
        tensor.clone().requires_grad_() for tensor in (inputs.phi, inputs.alpha, inputs.bias)
    )

    def connect(x: Tensor, branch: Branch) -> Tensor:
        u, (post, comb) = functional.mhc_pre(
            x,
            *parameters,
            norm_eps=numerics.norm_eps,
            mhc_mult=problem.streams,
            post_mult_value=2.0,
            pre_eps=numerics.hc_eps,
            sinkhorn_eps=numerics.hc_eps,
            sinkhorn_repeat=ITERATIONS,
        )
        new: Tensor = functional.mhc_post(branch(u), x, post, comb)
        return new

    return Candidate(
        name="tile-kernels",
        connect=connect,
        step=without_branch(connect),
        parameters=parameters,
        oracle=partial(reference_step, numerics="deepseek_v4"),
    )
