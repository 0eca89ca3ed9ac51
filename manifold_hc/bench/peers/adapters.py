"""One function per peer: import it, load its parameters from ours, call it like our connection.

Each package is imported inside its function, so that none of them is needed to use this one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from manifold_hc.bench.peers.implementations import Connected, load
from manifold_hc.bench.problem import Inputs, Problem
from manifold_hc.connection import Branch
from manifold_hc.constraints import sinkhorn
from manifold_hc.numerics import preset
from manifold_hc.reference import coefficients, read, write

Adapter = Callable[[Problem, Inputs], Connected]
"""(problem, inputs) -> connection and its parameters, in the order of the oracle's arguments."""

ITERATIONS = 20
"""Sinkhorn-Knopp iterations of the papers and of every peer."""

V4 = preset("deepseek_v4")


def transformers(problem: Problem, inputs: Inputs) -> Connected:
    """`DeepseekV4HyperConnection`, with the two lines by which its decoder layer writes back.

    `fn`, `scale` and `base` are our phi, alpha and bias; its mixing matrix is `res` transposed. In
    bfloat16 it mixes with rounded coefficients.
    """
    from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection

    config = DeepseekV4Config(
        hc_mult=problem.streams,
        hidden_size=problem.channels,
        num_hidden_layers=1,
        rms_norm_eps=V4.norm_eps,
    )
    module = DeepseekV4HyperConnection(config).to(problem.device)
    load(module, fn=inputs.phi, scale=inputs.alpha, base=inputs.bias)

    def connect(x: Tensor, branch: Branch) -> Tensor:
        post, comb, u = module(x)
        mixed = torch.matmul(comb.to(x.dtype).transpose(-1, -2), x)
        return post.to(x.dtype).unsqueeze(-1) * branch(u).unsqueeze(-2) + mixed

    return connect, (module.fn, module.scale, module.base)


def hyper_connections(problem: Problem, inputs: Inputs) -> Connected:
    """`mHCv2`, the variant whose streams have our layout [..., n, C].

    It applies one C x (n + 1) projection to each stream. The pre column is the first pre row of our
    phi on the first stream, the others likewise: no choice of parameters gives mHC's joint
    projection.
    """
    from hyper_connections.mHCv2 import ManifoldConstrainedHyperConnections

    n, C = problem.streams, problem.channels
    module = ManifoldConstrainedHyperConnections(
        n, dim=C, layer_index=0, sinkhorn_iters=ITERATIONS
    ).to(problem.device)
    pre, post, res = inputs.bias.tensor_split((n, 2 * n))
    rows = torch.cat([inputs.phi[:1, :C], inputs.phi[2 * n : 3 * n, :C]])
    tensors = {
        "dynamic_alpha_fn": n**0.5 * rows.mT[None],
        "dynamic_beta_fn": n**0.5 * inputs.phi[n, :C, None],
        "static_alpha": torch.cat([pre[:, None], res.unflatten(0, (n, n))], 1),
        "static_beta": post[:, None, None],
        "pre_branch_scale": inputs.alpha[:1],
        "residual_scale": inputs.alpha[2:],
        "h_post_scale": inputs.alpha[1],
    }
    load(module, **tensors)

    def connect(x: Tensor, branch: Branch) -> Any:
        u, add_residual = module(x)
        return add_residual(branch(u))

    return connect, tuple(map(module.get_parameter, ("norm.gamma", *tensors)))


def separate_streams(x: Tensor, y: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
    """(u, x') by hyper-connections' equations, on our reference's operators."""
    gamma, W_alpha, W_beta, static_alpha, static_beta, *scales = parameters
    scale_pre, scale_res, scale_post = scales
    n, C = x.shape[-2:]
    normed = torch.nn.functional.rms_norm(x, (C,), eps=0.0) * (gamma + 1)
    gates = torch.cat([scale_pre, scale_res.expand(n)])
    logits = (normed @ W_alpha[0]) * gates + static_alpha  # [*batch, i, pre | target]
    res = sinkhorn(logits[..., 1:], ITERATIONS, preset("paper")).mT
    post = 2 * ((normed @ W_beta) * scale_post + static_beta[..., 0]).sigmoid()[..., 0]
    return read(x, logits[..., 0].sigmoid()), write(x, y, post, res)


def liger_kernel(problem: Problem, inputs: Inputs) -> Connected:
    """Liger-Kernel's three operators, with DeepSeek-V4's epsilons.

    `phi` is ours transposed, in the streams' dtype as its authors advise; its `comb` mixes without
    the transpose, so that its res is the transpose of V4's.
    """
    from liger_kernel.transformers import functional

    phi = inputs.phi.mT.to(problem.torch_dtype).contiguous().requires_grad_()
    bias = inputs.bias.clone().requires_grad_()
    alphas = tuple(alpha.clone().requires_grad_() for alpha in inputs.alpha.unbind())

    def connect(x: Tensor, branch: Branch) -> Any:
        pre, post, res = functional.liger_mhc_coeffs(
            x,
            phi,
            bias,
            *alphas,
            allow_fp32=True,
            tmax=ITERATIONS,
            rms_eps=V4.norm_eps,
            pre_eps=V4.hc_eps,
            sinkhorn_eps=V4.hc_eps,
        )
        u = functional.liger_mhc_pre(x, pre)
        return functional.liger_mhc_post_res(x, branch(u), post, res)

    return connect, (phi, bias, *alphas)


def untransposed(
    x: Tensor, y: Tensor, phi: Tensor, bias: Tensor, *alphas: Tensor
) -> tuple[Tensor, Tensor]:
    """(u, x') by Liger-Kernel's equations, on our reference's operators."""
    pre, post, res = coefficients(x, phi.mT, torch.stack(alphas), bias, ITERATIONS, "sinkhorn", V4)
    return read(x, pre), write(x, y, post, res.mT)


def tile_kernels(problem: Problem, inputs: Inputs) -> Connected:
    """DeepSeek's TileKernels: our parameters, n = 4 and bfloat16 only.

    With V4's 20 iterations and factor 2; its own defaults are 10 and 1.
    """
    from tile_kernels.modeling.mhc import functional

    phi, alpha, bias = (
        tensor.clone().requires_grad_() for tensor in (inputs.phi, inputs.alpha, inputs.bias)
    )

    def connect(x: Tensor, branch: Branch) -> Any:
        u, (post, comb) = functional.mhc_pre(
            x,
            phi,
            alpha,
            bias,
            norm_eps=V4.norm_eps,
            mhc_mult=problem.streams,
            post_mult_value=2.0,
            pre_eps=V4.hc_eps,
            sinkhorn_eps=V4.hc_eps,
            sinkhorn_repeat=ITERATIONS,
        )
        return functional.mhc_post(branch(u), x, post, comb)

    return connect, (phi, alpha, bias)
