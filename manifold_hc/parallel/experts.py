"""Expert parallelism: every process has some of the experts; tokens travel to them and back."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from manifold_hc.models.experts import RoutedExperts


def share_experts(routed: RoutedExperts, mesh: DeviceMesh) -> None:
    """Give each of P processes E / P consecutive experts, in place, and the rows that they get."""
    for name, weight in list(routed.named_parameters(recurse=False)):
        setattr(routed, name, nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)])))
    exchange = Exchange(mesh)
    routed.register_forward_pre_hook(exchange.there)
    routed.register_forward_hook(exchange.back)


class _Route(NamedTuple):
    """Where the rows of one call came from."""

    sent: list[int]
    """Rows that went to each process."""
    received: list[int]
    """Rows that came from each."""
    arrived: Int[Tensor, " S"]
    """Where each row, in the order of experts, was in the order of processes."""


class Exchange:
    """Hooks around a mixture's experts: rows go to their expert's process, results come back."""

    def __init__(self, mesh: DeviceMesh) -> None:
        """mesh: the processes that share the experts."""
        self.group, self.size = mesh.get_group(), mesh.size()
        self._route: _Route | None = None

    def there(
        self, _: nn.Module, arguments: tuple[Float[Tensor, "R C"], Int[Tensor, " E"]]
    ) -> tuple[Float[Tensor, "S C"], Int[Tensor, " E_P"]]:
        """Rows in the order of all experts -> those of this process's experts, in their order."""
        rows, load = arguments
        going = load.view(self.size, -1)  # process, expert there
        coming = torch.empty_like(going)  # process, expert here
        dist.all_to_all_single(coming, going, group=self.group)
        sent, received = going.sum(1).tolist(), coming.sum(1).tolist()
        rows = _Exchanged.apply(rows, received, sent, self.group)
        expert = torch.arange(coming.shape[1], device=load.device).repeat(self.size)
        arrived = expert.repeat_interleave(coming.flatten()).argsort(stable=True)
        self._route = _Route(sent, received, arrived)
        return rows[arrived], coming.sum(0)

    def back(self, _: nn.Module, arguments: Any, out: Float[Tensor, "S C"]) -> Tensor:
        """Results of this process's experts -> those of this process's own rows."""
        assert self._route is not None
        sent, received, arrived = self._route
        self._route = None
        order = torch.empty_like(arrived).scatter_(
            0, arrived, torch.arange(len(arrived), device=arrived.device)
        )
        return _Exchanged.apply(out[order], sent, received, self.group)


class _Exchanged(torch.autograd.Function):
    """all_to_all over rows; its backward the other way round."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        coming: list[int],
        going: list[int],
        group: dist.ProcessGroup,
    ) -> Tensor:
        ctx.sizes, ctx.group = (coming, going), group
        return _all_to_all(rows, coming, going, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        coming, going = ctx.sizes
        return _all_to_all(grad, going, coming, ctx.group), None, None, None


def _all_to_all(
    rows: Tensor, coming: list[int], going: list[int], group: dist.ProcessGroup
) -> Tensor:
    result = rows.new_empty(sum(coming), *rows.shape[1:])
    dist.all_to_all_single(result, rows.contiguous(), coming, going, group=group)
    return result
