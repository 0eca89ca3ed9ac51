"""Tensor and sequence parallelism: weights sharded by head or hidden unit, streams by token.

Each of P ranks holds T / P consecutive tokens of every sequence, with all n streams. A branch
all-gathers the tokens of its input u, computes the partial result of this rank's heads or hidden
units for all tokens, and reduce-scatters the sum over ranks back to each rank's tokens. The streams
themselves are never communicated: that would cost n times as much.
"""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.functional import linear

from manifold_hc.models.attention import LatentAttention
from manifold_hc.models.feed_forward import GatedFeedForward, gated_hidden
from manifold_hc.models.linear import Linear
from manifold_hc.parallel.mesh import local_shard

SHARDED = {
    LatentAttention: {"query.weight": 0, "decompress.weight": 0, "output.weight": 1},
    GatedFeedForward: {"gate_up": 1, "down.weight": 1},
}
"""Sharded weights of each kind of branch: name -> dimension over heads or hidden units.

The first projections are sharded by output (column parallel), the last one by input (row parallel),
so that one all-gather and one reduce-scatter suffice for a branch.
"""


class ShardedLinear(Linear):
    """Linear layer over this rank's rows or columns of the weight."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the local shard: [..., local inputs] -> [..., local outputs]."""
        return linear(x, local_shard(self.weight))


class ShardedFeedForward(GatedFeedForward):
    """Gated feed-forward layer over this rank's hidden units."""

    def forward(self, u: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch C"]:
        """Return the partial result [..., C] of the local hidden units."""
        return self.down(gated_hidden(u, local_shard(self.gate_up)))


FORWARDS: dict[type[nn.Module], type[nn.Module]] = {
    Linear: ShardedLinear,
    GatedFeedForward: ShardedFeedForward,
}
"""Classes of modules with sharded weights, by the class of the whole module."""


def shard_branch(branch: nn.Module, mesh: DeviceMesh) -> list[nn.Module]:
    """Shard a branch over `mesh` by heads or hidden units, in place.

    Returns the submodules whose weights stay whole on every rank. Each rank computes their gradient
    from its own heads only, so the caller must sum these gradients over `mesh`.
    """
    sharded = SHARDED[type(branch)]
    for name, dimension in sharded.items():
        owner, _, key = name.rpartition(".")
        module = branch.get_submodule(owner)
        weight = distribute_tensor(getattr(module, key), mesh, [Shard(dimension)])
        setattr(module, key, nn.Parameter(weight))
        # As fully_shard does: a new class keeps the module's name, its hooks and its state_dict.
        module.__class__ = FORWARDS[type(module)]
    # The first projections need all tokens of u; the last one leaves, for all tokens, a partial sum
    # over the local heads.
    group = mesh.get_group()
    branch.register_forward_pre_hook(lambda _, given: (_AllGatherTokens.apply(given[0], group),))
    branch.register_forward_hook(lambda _, given, out: _ReduceScatterTokens.apply(out, group))
    whole = {name.rpartition(".")[0] for name, _ in branch.named_parameters()}
    whole -= {name.rpartition(".")[0] for name in sharded}
    return [branch.get_submodule(name) for name in sorted(whole)]


class _AllGatherTokens(torch.autograd.Function):
    """All-gather the tokens; backward reduce-scatters the gradients.

    Every rank's heads contribute to the gradient of every token, hence the sum in backward.
    """

    @staticmethod
    def forward(ctx: Any, local: Float[Tensor, "B T_P C"], group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_gather(local, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter(grad, ctx.group), None


class _ReduceScatterTokens(torch.autograd.Function):
    """Sum the partial results over ranks and keep the local tokens; backward all-gathers."""

    @staticmethod
    def forward(ctx: Any, partial: Float[Tensor, "B T C"], group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _reduce_scatter(partial, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_gather(grad, ctx.group), None


def _all_gather(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, T/P, C] of every rank -> [B, T, C]."""
    shards = [
        torch.empty_like(local, memory_format=torch.contiguous_format) for _ in range(group.size())
    ]
    dist.all_gather(shards, local.contiguous(), group=group)
    return torch.cat(shards, 1)


def _reduce_scatter(partial: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, T, C] of every rank -> their sum for this rank's tokens, [B, T/P, C]."""
    chunks = [chunk.contiguous() for chunk in partial.chunk(group.size(), 1)]
    total = torch.empty_like(chunks[0])
    dist.reduce_scatter(total, chunks, group=group)
    return total
