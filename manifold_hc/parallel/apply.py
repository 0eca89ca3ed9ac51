"""What is done to a model that several processes share, in this order."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from manifold_hc.maps import WideModule
from manifold_hc.models import Decoder
from manifold_hc.models.experts import mixtures
from manifold_hc.parallel.experts import share_experts
from manifold_hc.parallel.processes import Processes
from manifold_hc.parallel.tensor import SHARDED, share_branch

FLOAT32 = MixedPrecisionPolicy()
"""Weights are gathered as they are kept."""


def distribute(model: Decoder, processes: Processes, precision: torch.dtype) -> None:
    """Spread `model` over the processes, in place; every one must have the same weights.

    precision: what the branches compute in. Weights are kept in float32.
    """
    if processes.mesh is None:
        return
    degrees, everyone = processes.config, processes.mesh
    # All processes of a copy have other tokens: what is computed token by token, they share alike.
    copy = degrees.shard * degrees.tensor
    dense = everyone._unflatten(0, (degrees.replicate, copy), ("replicate", "shard"))
    special: dict[nn.Module, DeviceMesh] = {}
    if degrees.tensor > 1:
        sizes = (degrees.replicate, degrees.shard, degrees.tensor)
        heads = everyone._unflatten(0, sizes, ("replicate", "shard", "tensor"))
        for branch in model.branches:
            if type(branch) in SHARDED:
                special |= dict.fromkeys(share_branch(branch, heads["tensor"]), _copied(dense))
                special[branch] = _copied(heads)
    if degrees.experts > 1:
        sizes = (degrees.replicate, copy // degrees.experts, degrees.experts)
        sparse = everyone._unflatten(0, sizes, ("replicate", "shard", "experts"))
        for mixture in mixtures(model).values():
            share_experts(mixture.routed, sparse["experts"])
            special[mixture.routed] = _copied(sparse)
    _shard(model, _copied(dense), special, precision)
    _tell_progress(model, processes)


def _copied(mesh: DeviceMesh) -> DeviceMesh:
    """The axes that FSDP sees: hybrid where there are copies."""
    return mesh["replicate", "shard"] if mesh["replicate"].size() > 1 else mesh["shard"]


def _shard(
    model: Decoder,
    mesh: DeviceMesh,
    special: dict[nn.Module, DeviceMesh],
    precision: torch.dtype,
) -> None:
    """FSDP2: every branch a unit, gathered in `precision` when it runs; its router in float32.

    What is left makes one unit in float32, gathered for the whole of a step: connections and norms,
    less than a thousandth of a large model. Connections see no hooks of FSDP that way, and hand
    their streams on as they are.

    special: modules that other processes share than the rest.
    """
    narrow = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32)
    for branch in model.branches:
        for module in branch.modules():
            if isinstance(module, WideModule):
                _unit(module, mesh)
            elif module in special and module is not branch:
                _unit(module, special[module], narrow)
        _unit(branch, special.get(branch, mesh), narrow)
    _unit(model.head, mesh, narrow)
    # The gradients of a token's rows are summed in the dtype that the embedding is gathered in.
    _unit(model.embedding, mesh)
    _unit(model, mesh)


def _unit(module: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy = FLOAT32) -> None:
    """The loss is a sum over all processes' tokens, and so is every gradient: FSDP would average.

    How many processes share a weight differs from unit to unit.
    """
    unit = fully_shard(module, mesh=mesh, mp_policy=policy)
    unit.set_gradient_divide_factor(1.0)
    unit.set_force_sum_reduction_for_comms(True)


def _tell_progress(model: Decoder, processes: Processes) -> None:
    for name, branch in model.branches.named_children():
        branch.register_forward_pre_hook(_begins(f"sublayer {name}", processes))


def _begins(operation: str, processes: Processes) -> Callable[[nn.Module, Any], None]:
    def tell(module: nn.Module, arguments: Any) -> None:
        processes.at(operation)

    return tell
