"""Other implementations of mHC, their parameters loaded from ours.

A peer is imported where it is built, so that none of them is needed to use this package.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata

import torch
from torch import Tensor

from manifold_hc import constraints, reference
from manifold_hc.bench.peers import gpu_adapters
from manifold_hc.bench.peers.implementations import Candidate, quiet, without_branch
from manifold_hc.bench.problem import Inputs, Problem, reference_step
from manifold_hc.connection import Branch
from manifold_hc.numerics import preset

ITERATIONS = 20
"""Sinkhorn-Knopp iterations, the papers' and every peer's."""


@dataclass(frozen=True)
class Peer:
    """One row of the table of peers."""

    package: str
    """Distribution that brings it; the extra `bench` pins its version."""
    build: Callable[[Problem, Inputs], Candidate]
    """Makes it at one size."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    """Where it runs."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    """Of the streams that it takes."""
    streams: tuple[int, ...] = ()
    """Numbers of streams that it takes; empty for any."""
    compiles: bool = False
    """Whether it is timed through torch.compile too."""

    def takes(self, problem: Problem) -> bool:
        """Whether it runs at this size, dtype and device."""
        return (
            problem.device.partition(":")[0] in self.devices
            and problem.dtype in self.dtypes
            and (not self.streams or problem.streams in self.streams)
        )

    @property
    def version(self) -> str | None:
        """The installed one; None where it is missing."""
        try:
            return metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return None


def transformers(problem: Problem, inputs: Inputs) -> Candidate:
    """`DeepseekV4HyperConnection`, with the two lines by which its decoder layer writes back.

    `fn`, `scale` and `base` are our phi, alpha and bias as they are; its mixing matrix is `res`
    transposed. In bfloat16 it mixes with rounded coefficients.
    """
    with quiet():
        from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
        from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection

        config = DeepseekV4Config(
            hc_mult=problem.streams,
            hidden_size=problem.channels,
            num_hidden_layers=1,
            rms_norm_eps=preset("deepseek_v4").norm_eps,
        )
        module = DeepseekV4HyperConnection(config).to(problem.device)
    _load(module, fn=inputs.phi, scale=inputs.alpha, base=inputs.bias)

    def connect(x: Tensor, branch: Branch) -> Tensor:
        post, comb, u = module(x)
        mixed = torch.matmul(comb.to(x.dtype).transpose(-1, -2), x)
        return post.to(x.dtype).unsqueeze(-1) * branch(u).unsqueeze(-2) + mixed

    return Candidate(
        name="transformers",
        connect=connect,
        step=without_branch(connect),
        parameters=(module.fn, module.scale, module.base),
        oracle=partial(reference_step, numerics="deepseek_v4"),
    )


SEPARATE = "each stream normalised and projected by itself, as in HC; res = Sinkhorn transposed"


def hyper_connections(problem: Problem, inputs: Inputs) -> Candidate:
    """`mHCv2`, the variant whose streams lie as ours do.

    Its projection is C x (n + 1), applied to each stream: the pre column is our phi's first pre
    row on the first stream, and so on; there is no choice of parameters with which it computes
    what mHC's joint projection does.
    """
    n, C = problem.streams, problem.channels
    with quiet():
        from hyper_connections.mHCv2 import ManifoldConstrainedHyperConnections

        module = ManifoldConstrainedHyperConnections(
            n, dim=C, layer_index=0, sinkhorn_iters=ITERATIONS
        ).to(problem.device)
    pre, post, res = inputs.bias.tensor_split((n, 2 * n))
    rows = torch.cat([inputs.phi[:1, :C], inputs.phi[2 * n : 3 * n, :C]])
    _load(
        module,
        dynamic_alpha_fn=n**0.5 * rows.mT[None],
        dynamic_beta_fn=n**0.5 * inputs.phi[n, :C, None],
        static_alpha=torch.cat([pre[:, None], res.unflatten(0, (n, n))], 1),
        static_beta=post[:, None, None],
        pre_branch_scale=inputs.alpha[:1],
        residual_scale=inputs.alpha[2:],
        h_post_scale=inputs.alpha[1],
    )

    def connect(x: Tensor, branch: Branch) -> Tensor:
        u, write = module(x)
        new: Tensor = write(branch(u))
        return new

    named = dict(module.named_parameters())
    return Candidate(
        name="hyper-connections",
        connect=connect,
        step=without_branch(connect),
        parameters=tuple(named[name] for name in SEPARATE_PARAMETERS),
        oracle=separate_streams,
        note=f"other maths: {SEPARATE}",
    )


SEPARATE_PARAMETERS = (
    "norm.gamma",
    "dynamic_alpha_fn",
    "dynamic_beta_fn",
    "static_alpha",
    "static_beta",
    "pre_branch_scale",
    "residual_scale",
    "h_post_scale",
)


def separate_streams(
    x: Tensor,
    y: Tensor,
    gamma: Tensor,
    W_alpha: Tensor,
    W_beta: Tensor,
    static_alpha: Tensor,
    static_beta: Tensor,
    scale_pre: Tensor,
    scale_res: Tensor,
    scale_post: Tensor,
) -> tuple[Tensor, Tensor]:
    """(u, x') by hyper-connections' equations, on our reference's operators."""
    n, C = x.shape[-2:]
    normed = torch.nn.functional.rms_norm(x, (C,), eps=0.0) * (gamma + 1)
    gates = torch.cat([scale_pre, scale_res.expand(n)])
    logits = (normed @ W_alpha[0]) * gates + static_alpha  # [*batch, i, pre | target]
    numerics = preset("paper")
    res = constraints.sinkhorn(logits[..., 1:], ITERATIONS, numerics).mT
    post = 2 * ((normed @ W_beta) * scale_post + static_beta[..., 0]).sigmoid()[..., 0]
    return reference.read(x, logits[..., 0].sigmoid()), reference.write(x, y, post, res)


PEERS = (
    Peer("transformers", transformers, compiles=True),
    Peer("hyper-connections", hyper_connections, compiles=True),
    Peer("liger-kernel", gpu_adapters.liger, devices=("cuda",), streams=(2, 4, 8, 16)),
    Peer(
        "tile-kernels",
        gpu_adapters.tile_kernels,
        devices=("cuda",),
        dtypes=("bfloat16",),
        streams=(4,),
    ),
)
"""Every one of them is required where it runs."""


def for_problem(problem: Problem) -> list[Peer]:
    """The peers that are wanted at this size, dtype and device."""
    return [peer for peer in PEERS if peer.takes(problem)]


def _load(module: torch.nn.Module, **tensors: Tensor) -> None:
    with torch.no_grad():
        for name, tensor in tensors.items():
            module.get_parameter(name).copy_(tensor)
