"""Device meshes of a run, and the DTensors on them."""

from typing import NamedTuple

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from manifold_hc.parallel.config import ParallelConfig


class Meshes(NamedTuple):
    """Meshes over the ranks of a run, one for each way of sharding weights.

    Every mesh has the axes "pipeline" and "replicate" first.
    """

    dense: DeviceMesh
    """Axis "shard" over all ranks of a replica: they hold different tokens of a batch."""
    tensor: DeviceMesh
    """Axes "shard" and "tensor": heads and hidden units are sharded along "tensor"."""
    experts: DeviceMesh
    """Axes "shard" and "experts": experts are sharded along "experts"."""


def build_meshes(world: DeviceMesh, degrees: ParallelConfig) -> Meshes:
    """Build the meshes from the one-dimensional mesh of all ranks; a collective call."""
    replica = degrees.shard * degrees.tensor

    def unflatten(inner: dict[str, int]) -> DeviceMesh:
        sizes = {"pipeline": degrees.pipeline, "replicate": degrees.replicate, **inner}
        return world._unflatten(0, tuple(sizes.values()), tuple(sizes))

    # Creating a process group is a collective of all ranks: every rank creates the same groups in
    # the same order, also those that it is not a member of.
    dense = tensor = experts = unflatten({"shard": replica})
    if degrees.tensor > 1:
        tensor = unflatten({"shard": degrees.shard, "tensor": degrees.tensor})
    if degrees.experts > 1:
        experts = unflatten({"shard": replica // degrees.experts, "experts": degrees.experts})
    return Meshes(dense, tensor, experts)


def fsdp_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """Return the axes that FSDP uses: "shard", and "replicate" if there are replicas (HSDP)."""
    return mesh["replicate", "shard"] if mesh["replicate"].size() > 1 else mesh["shard"]


def local_shard(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, and any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def parameters_by_mesh(model: nn.Module) -> list[list[nn.Parameter]]:
    """Group the parameters by their mesh: torch's foreach operations take one mesh at a time."""
    meshes: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        meshes.setdefault(mesh, []).append(parameter)
    return list(meshes.values())
