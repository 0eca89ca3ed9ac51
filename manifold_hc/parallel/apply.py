"""What is done to a model that several processes share, in this order."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from manifold_hc.models import Decoder
from manifold_hc.models.attention import LatentAttention
from manifold_hc.models.experts import mixtures
from manifold_hc.models.feed_forward import GatedFeedForward
from manifold_hc.parallel.config import SPLITTING
from manifold_hc.parallel.experts import share_experts
from manifold_hc.parallel.pipeline import Pipeline, cut
from manifold_hc.parallel.processes import Processes
from manifold_hc.parallel.tensor import SHARDED, share_branch
from manifold_hc.precision import WideModule
from manifold_hc.stack import present

FLOAT32 = MixedPrecisionPolicy()
"""Weights are gathered as they are kept."""

COMPILED = (LatentAttention, GatedFeedForward)
"""Modules whose forward torch.compile takes whole; shared experts are among them."""

Special = dict[nn.Module, DeviceMesh]
"""Modules that other processes share than the rest."""


def distribute(
    model: Decoder,
    processes: Processes,
    precision: torch.dtype,
    *,
    microbatches: int = 1,
    compiled: bool = False,
) -> Decoder | Pipeline:
    """Spread `model` over the processes; every one must have the same weights.

    Returns what this process has of it: the model itself, changed in place, or its stages.
    precision: what the branches compute in; weights are kept in float32. microbatches: what a
    pipeline cuts a process's part of a batch into. compiled: whether torch.compile takes dense
    branches and shared experts.
    """
    meshes = _meshes(processes) if processes.config.copies > 1 else None
    if processes.config.pipeline == 1:
        _spread(model, model, processes, meshes, precision, compiled)
        return model
    stages = cut(model, processes, precision)
    for stage in stages.values():
        _spread(stage.decoder, stage, processes, meshes, precision, compiled)
    return Pipeline(stages, processes, microbatches)


def _spread(
    model: Decoder,
    unit: nn.Module,
    processes: Processes,
    meshes: "_Meshes | None",
    precision: torch.dtype,
    compiled: bool,
) -> None:
    """Spread a decoder, or a part, over the processes that have its layers; `unit` calls it.

    Recompute needs nothing done: its blocks are the stack's own, and end with it.
    """
    special: Special = {}
    if meshes and processes.config.tensor > 1:
        special |= _share_branches(model, meshes)
    if meshes and processes.config.experts > 1:
        special |= _share_experts(model, meshes)
    if compiled:
        _compile(model)
    if meshes:
        _shard(model, unit, meshes.dense, special, precision, _keeps_whole(processes))
    _tell_progress(model, processes)


class _Meshes(NamedTuple):
    """How the processes of a copy share its weights; all processes make them together."""

    dense: DeviceMesh
    """All of them have other tokens: what is computed token by token, they share alike."""
    heads: DeviceMesh
    """Heads and hidden units along "tensor"."""
    sparse: DeviceMesh
    """Experts along "experts"."""


def _meshes(processes: Processes) -> _Meshes:
    degrees = processes.config
    copy = degrees.shard * degrees.tensor

    def grid(inner: dict[str, int]) -> DeviceMesh:
        assert processes.mesh is not None
        sizes = {"pipeline": degrees.pipeline, "replicate": degrees.replicate, **inner}
        return processes.mesh._unflatten(0, tuple(sizes.values()), tuple(sizes))

    dense = heads = sparse = grid({"shard": copy})
    if degrees.tensor > 1:
        heads = grid({"shard": degrees.shard, "tensor": degrees.tensor})
    if degrees.experts > 1:
        sparse = grid({"shard": copy // degrees.experts, "experts": degrees.experts})
    return _Meshes(dense, heads, sparse)


def _share_branches(model: Decoder, meshes: _Meshes) -> Special:
    """Tensor and sequence parallelism."""
    special: Special = {}
    for branch in present(model.branches):
        if type(branch) in SHARDED:
            whole = share_branch(branch, meshes.heads["tensor"])
            special |= dict.fromkeys(whole, _copied(meshes.dense))
            special[branch] = _copied(meshes.heads)
    return special


def _share_experts(model: Decoder, meshes: _Meshes) -> Special:
    """Expert parallelism."""
    special: Special = {}
    for mixture in mixtures(model).values():
        share_experts(mixture.routed, meshes.sparse["experts"])
        special[mixture.routed] = _copied(meshes.sparse)
    return special


def _compile(model: Decoder) -> None:
    """What is inside of all hooks: collectives stay outside."""
    for module in model.modules():
        if isinstance(module, COMPILED):
            module.forward = torch.compile(module.forward)  # type: ignore[method-assign]


def _keeps_whole(processes: Processes) -> bool:
    """Whether weights stay gathered between forward and backward.

    Where a schedule computes gradients of inputs and of weights apart, FSDP does not see backward
    begin: weights that are sharded by then give wrong gradients, or none.
    """
    degrees = processes.config
    return degrees.pipeline > 1 and degrees.schedule in SPLITTING


def _copied(mesh: DeviceMesh) -> DeviceMesh:
    """The axes that FSDP sees: hybrid where there are copies."""
    return mesh["replicate", "shard"] if mesh["replicate"].size() > 1 else mesh["shard"]


def _shard(
    model: Decoder,
    unit: nn.Module,
    dense: DeviceMesh,
    special: Special,
    precision: torch.dtype,
    keep: bool,
) -> None:
    """FSDP2: every branch a unit, gathered in `precision` when it runs; its router in float32.

    What is left makes one unit in float32, gathered for the whole of a step: connections and norms,
    less than a thousandth of a large model. Connections see no hooks of FSDP that way, and hand
    their streams on as they are.

    keep: whether what is gathered in forward stays for backward. Gradients of microbatches are
    then summed in the dtype that is gathered: all is float32, and autocast narrows it.
    """
    mesh = _copied(dense)
    narrow = FLOAT32 if keep else MixedPrecisionPolicy(precision, torch.float32)

    def make(module: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy = FLOAT32) -> None:
        # The loss is a sum over all processes' tokens, and so is every gradient: FSDP would
        # average. How many processes share a weight differs from unit to unit.
        sharded = fully_shard(
            module, mesh=mesh, mp_policy=policy, reshard_after_forward=False if keep else None
        )
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)

    for branch in present(model.branches):
        for module in branch.modules():
            if isinstance(module, WideModule):
                make(module, mesh)
            elif module in special and module is not branch:
                make(module, special[module], narrow)
        make(branch, special.get(branch, mesh), narrow)
    if model.head is not None:
        make(model.head, mesh, narrow)
    if model.embedding is not None:
        # The gradients of a token's rows are summed in the dtype that it is gathered in.
        make(model.embedding, mesh)
    make(unit, mesh)


def _tell_progress(model: Decoder, processes: Processes) -> None:
    if processes.mesh is None:
        return
    for name, branch in model.branches.named_children():
        branch.register_forward_pre_hook(_begins(f"sublayer {name}", processes))


def _begins(operation: str, processes: Processes) -> Callable[[nn.Module, Any], None]:
    def tell(module: nn.Module, arguments: Any) -> None:
        processes.at(operation)

    return tell
