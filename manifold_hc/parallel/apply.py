"""Parallelism applied to a model from outside, in this order.

Pipeline stages, tensor parallelism, expert parallelism, torch.compile, FSDP2, progress reports.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from manifold_hc.models import Decoder
from manifold_hc.models.attention import LatentAttention
from manifold_hc.models.experts import mixtures
from manifold_hc.models.feed_forward import GatedFeedForward
from manifold_hc.parallel.config import SPLIT_BACKWARD
from manifold_hc.parallel.experts import shard_experts
from manifold_hc.parallel.mesh import Meshes, build_meshes, fsdp_mesh
from manifold_hc.parallel.pipeline import Pipeline, split_into_stages
from manifold_hc.parallel.processes import Processes
from manifold_hc.parallel.tensor import SHARDED, shard_branch
from manifold_hc.precision import WideModule
from manifold_hc.stack import present

FLOAT32 = MixedPrecisionPolicy()
"""All-gather weights in float32, as they are stored."""

COMPILED = (LatentAttention, GatedFeedForward)
"""Modules whose forward torch.compile captures as one graph; shared experts are among them."""

FsdpMeshes = dict[nn.Module, DeviceMesh]
"""FSDP meshes of the modules that do not use the dense one."""


def distribute(
    model: Decoder,
    processes: Processes,
    precision: torch.dtype,
    *,
    microbatches: int = 1,
    compiled: bool = False,
) -> Decoder | Pipeline:
    """Distribute a model over the ranks of a run.

    Args:
        model: a decoder with the same weights on every rank; changed in place.
        processes: the ranks of the run.
        precision: dtype of the branches' products; weights are stored in float32.
        microbatches: number of microbatches per pipeline step, from this rank's slice of a batch.
        compiled: apply torch.compile to dense branches and shared experts.

    Returns:
        The model itself, or this rank's pipeline stages.
    """
    meshes = None
    if processes.mesh is not None and processes.config.stage_ranks > 1:
        meshes = build_meshes(processes.mesh, processes.config)
    if processes.config.pipeline == 1:
        _distribute_layers(model, model, processes, meshes, precision, compiled)
        return model
    stages = split_into_stages(model, processes, precision)
    for stage in stages.values():
        _distribute_layers(stage.decoder, stage, processes, meshes, precision, compiled)
    return Pipeline(stages, processes, microbatches)


def _distribute_layers(
    model: Decoder,
    root: nn.Module,
    processes: Processes,
    meshes: Meshes | None,
    precision: torch.dtype,
    compiled: bool,
) -> None:
    """Distribute a decoder, or the part of one stage, over the ranks that hold its layers.

    root: module that calls `model`, the root unit of FSDP. Recompute blocks need no treatment: they
    belong to the stack and end with it.
    """
    special: FsdpMeshes = {}
    if meshes and processes.config.tensor > 1:
        special |= _shard_branches(model, meshes)
    if meshes and processes.config.experts > 1:
        special |= _shard_experts(model, meshes)
    # Before FSDP: its hooks run outside the compiled graphs.
    if compiled:
        _compile(model)
    if meshes:
        _fully_shard(model, root, meshes.dense, special, precision, _stays_gathered(processes))
    _report_sublayers(model, processes)


def _shard_branches(model: Decoder, meshes: Meshes) -> FsdpMeshes:
    """Apply tensor and sequence parallelism to the dense branches."""
    special: FsdpMeshes = {}
    for branch in present(model.branches):
        if type(branch) in SHARDED:
            whole = shard_branch(branch, meshes.tensor["tensor"])
            # Each tensor rank's heads give a part of the gradient of these whole weights: FSDP
            # over the dense mesh sums over tensor ranks as well.
            special |= dict.fromkeys(whole, fsdp_mesh(meshes.dense))
            special[branch] = fsdp_mesh(meshes.tensor)
    return special


def _shard_experts(model: Decoder, meshes: Meshes) -> FsdpMeshes:
    """Apply expert parallelism to the routed experts."""
    special: FsdpMeshes = {}
    for mixture in mixtures(model).values():
        shard_experts(mixture.routed, meshes.experts["experts"])
        # An expert's rank receives the rows of all ranks along "experts", so its gradient is
        # already summed along that axis: FSDP sums over the other axes only.
        special[mixture.routed] = fsdp_mesh(meshes.experts)
    return special


def _compile(model: Decoder) -> None:
    """Compile the forward methods inside of all hooks, so that collectives stay outside."""
    for module in model.modules():
        if isinstance(module, COMPILED):
            module.forward = torch.compile(module.forward)  # type: ignore[method-assign]


def _stays_gathered(processes: Processes) -> bool:
    """True if weights stay gathered between forward and backward.

    A schedule that computes gradients of inputs and of weights in two passes hides the start of
    backward from FSDP: weights that were resharded by then give wrong gradients, or none.
    """
    degrees = processes.config
    return degrees.pipeline > 1 and degrees.schedule in SPLIT_BACKWARD


def _fully_shard(
    model: Decoder,
    root: nn.Module,
    dense: DeviceMesh,
    special: FsdpMeshes,
    precision: torch.dtype,
    stays_gathered: bool,
) -> None:
    """Apply FSDP2: every branch is a unit, gathered in `precision`; its router in float32.

    The remaining parameters, connections and norms, form the root unit in float32, gathered for the
    whole step: less than a thousandth of a large model. FSDP puts no hooks on connections that way,
    and they return their streams as they are.

    stays_gathered: weights are not resharded after forward. FSDP then sums the gradients of
    microbatches in the gathered dtype, so weights are gathered in float32 and autocast casts them.
    """
    mesh = fsdp_mesh(dense)
    narrow = FLOAT32 if stays_gathered else MixedPrecisionPolicy(precision, torch.float32)

    def wrap(module: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy = FLOAT32) -> None:
        unit = fully_shard(
            module,
            mesh=mesh,
            mp_policy=policy,
            reshard_after_forward=False if stays_gathered else None,
        )
        # FSDP averages gradients over its mesh by default. Here the loss of each rank is already
        # divided by the targets of the whole batch, so the gradient is the sum over ranks; a mean
        # would also scale units differently, as their meshes differ in size.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)

    # Inner units first: fully_shard of a module takes the parameters that no unit inside has taken.
    for branch in present(model.branches):
        for module in branch.modules():
            if isinstance(module, WideModule):
                wrap(module, mesh)
            elif module in special and module is not branch:
                wrap(module, special[module], narrow)
        wrap(branch, special.get(branch, mesh), narrow)
    if model.head is not None:
        wrap(model.head, mesh, narrow)
    if model.embedding is not None:
        # Backward sums the gradients of a token's occurrences in the gathered dtype: float32.
        wrap(model.embedding, mesh)
    wrap(root, mesh)


def _report_sublayers(model: Decoder, processes: Processes) -> None:
    """Report every sublayer to the watchdog before it runs."""
    if processes.mesh is None:
        return
    for name, branch in model.branches.named_children():
        branch.register_forward_pre_hook(_report_hook(f"sublayer {name}", processes))


def _report_hook(operation: str, processes: Processes) -> Callable[[nn.Module, Any], None]:
    def report(module: nn.Module, arguments: Any) -> None:
        processes.report(operation)

    return report
