"""Tensor and sequence parallelism: a branch's weights by head or hidden unit, streams by token.

P processes have T / P consecutive tokens of every sequence each, with all n streams of them. A
branch gathers the tokens of its input u, computes what its own heads or hidden units make of all of
them, and leaves each process the sum over processes for its own tokens. The streams themselves
never travel: that would be n times as much.
"""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from manifold_hc.models.attention import LatentAttention
from manifold_hc.models.feed_forward import GatedFeedForward

SHARDED = {
    LatentAttention: {"query.weight": 0, "decompress.weight": 0, "output.weight": 1},
    GatedFeedForward: {"gate_up": 1, "down.weight": 1},
}
"""By kind of branch: the dimension of each weight that runs over heads or hidden units."""


def share_branch(branch: nn.Module, mesh: DeviceMesh) -> list[nn.Module]:
    """Give each process its heads or hidden units, in place, and the hooks that carry the tokens.

    Returns the modules inside whose weights every process has whole; each process sees what its
    heads make of them, so their gradients are summed over all.
    """
    sharded = SHARDED[type(branch)]
    for name, dimension in sharded.items():
        owner, _, key = name.rpartition(".")
        module = branch.get_submodule(owner)
        weight = distribute_tensor(getattr(module, key), mesh, [Shard(dimension)])
        setattr(module, key, nn.Parameter(weight))
    group = mesh.get_group()
    branch.register_forward_pre_hook(lambda _, given: (_Gathered.apply(given[0], group),))
    branch.register_forward_hook(lambda _, given, out: _Summed.apply(out, group))
    whole = {name.rpartition(".")[0] for name, _ in branch.named_parameters()}
    whole -= {name.rpartition(".")[0] for name in sharded}
    return [branch.get_submodule(name) for name in sorted(whole)]


class _Gathered(torch.autograd.Function):
    """Own tokens -> all tokens; backward: the sum of all processes' gradients, own tokens."""

    @staticmethod
    def forward(ctx: Any, own: Float[Tensor, "B T_P C"], group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gather(own, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum(grad, ctx.group), None


class _Summed(torch.autograd.Function):
    """Every process's summand for all tokens -> the sum for its own tokens; backward: gathered."""

    @staticmethod
    def forward(ctx: Any, part: Float[Tensor, "B T C"], group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _sum(part, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gather(grad, ctx.group), None


def _gather(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in _each(group)]
    dist.all_gather(parts, own.contiguous(), group=group)
    return torch.cat(parts, 1)


def _sum(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = [part.contiguous() for part in part.chunk(group.size(), 1)]
    total = torch.empty_like(parts[0])
    dist.reduce_scatter(total, parts, group=group)
    return total


def _each(group: dist.ProcessGroup) -> range:
    return range(group.size())
