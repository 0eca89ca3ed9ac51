"""Expert parallelism: every rank holds some of the experts; tokens travel to them and back."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from manifold_hc.models.experts import RoutedExperts, grouped_feed_forward
from manifold_hc.parallel.mesh import local_shard


class ShardedExperts(RoutedExperts):
    """Routed experts of this rank."""

    def forward(
        self, rows: Float[Tensor, "R C"], load: Int[Tensor, " E_P"]
    ) -> Float[Tensor, "R C"]:
        """Transform rows sorted by local expert; `load` counts the rows of each local expert."""
        return grouped_feed_forward(rows, local_shard(self.gate_up), local_shard(self.down), load)


def shard_experts(routed: RoutedExperts, mesh: DeviceMesh) -> None:
    """Give each of P ranks E / P consecutive experts and the token exchange, in place."""
    for name, weight in list(routed.named_parameters(recurse=False)):
        setattr(routed, name, nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)])))
    # As fully_shard does: a new class keeps the module's name, its hooks and its state_dict.
    routed.__class__ = ShardedExperts
    exchange = TokenExchange(mesh)
    routed.register_forward_pre_hook(exchange.dispatch)
    routed.register_forward_hook(exchange.combine)


class _Route(NamedTuple):
    """Routing of the rows of one forward call."""

    sent: list[int]
    """Number of rows sent to each rank."""
    received: list[int]
    """Number of rows received from each rank."""
    arrived: Int[Tensor, " S"]
    """Index, per row sorted by expert, into the received rows, which are sorted by rank."""


class TokenExchange:
    """Forward hooks of the routed experts: send rows to their expert's rank, results back."""

    def __init__(self, mesh: DeviceMesh) -> None:
        """mesh: one-dimensional, over the ranks that share the experts."""
        self.group, self.size = mesh.get_group(), mesh.size()
        self._route: _Route | None = None

    def dispatch(
        self, _: nn.Module, arguments: tuple[Float[Tensor, "R C"], Int[Tensor, " E"]]
    ) -> tuple[Float[Tensor, "S C"], Int[Tensor, " E_P"]]:
        """Send this rank's rows, sorted by global expert; return the local experts' rows and load.

        The returned rows are sorted by local expert.
        """
        rows, load = arguments
        outgoing = load.view(self.size, -1)  # [rank, that rank's local expert]
        incoming = torch.empty_like(outgoing)  # [rank, this rank's local expert]
        # Counts first: a rank must know how many rows it receives before it can allocate them.
        dist.all_to_all_single(incoming, outgoing, group=self.group)
        sent, received = outgoing.sum(1).tolist(), incoming.sum(1).tolist()
        rows = _AllToAll.apply(rows, received, sent, self.group)
        # Received rows are sorted by source rank, then expert; the experts need them by expert.
        expert = torch.arange(incoming.shape[1], device=load.device).repeat(self.size)
        arrived = expert.repeat_interleave(incoming.flatten()).argsort(stable=True)
        self._route = _Route(sent, received, arrived)
        return rows[arrived], incoming.sum(0)

    def combine(self, _: nn.Module, arguments: Any, out: Float[Tensor, "S C"]) -> Tensor:
        """Return the results of the local experts to the ranks that sent the rows."""
        assert self._route is not None
        sent, received, arrived = self._route
        self._route = None
        # The inverse permutation: from sorted by local expert back to sorted by source rank.
        order = torch.empty_like(arrived).scatter_(
            0, arrived, torch.arange(len(arrived), device=arrived.device)
        )
        return _AllToAll.apply(out[order], sent, received, self.group)


class _AllToAll(torch.autograd.Function):
    """All-to-all over rows; backward sends the gradients the opposite way."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        received: list[int],
        sent: list[int],
        group: dist.ProcessGroup,
    ) -> Tensor:
        ctx.sizes, ctx.group = (received, sent), group
        return _all_to_all(rows, received, sent, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        received, sent = ctx.sizes
        return _all_to_all(grad, sent, received, ctx.group), None, None, None


def _all_to_all(
    rows: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup
) -> Tensor:
    result = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(result, rows.contiguous(), received, sent, group=group)
    return result
