"""Parallelism of the model with connections, applied in torchtitan's order."""

from collections.abc import Iterable
from typing import Any, cast

from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torchtitan.models.deepseek_v3.parallelize import parallelize_deepseekv3


def parallelize(
    model: nn.Module, *, parallel_dims: Any, training: Any, **options: Any
) -> nn.Module:
    """Shard the connections in float32, then parallelise the model as torchtitan does.

    FSDP takes inner units first: torchtitan gathers the other parameters of a block in
    `training.mixed_precision_param`, which is too narrow for the coefficients. The connections of
    all blocks are one unit, less than a thousandth of a large model.

    Args:
        model: The whole model, or one pipeline stage of it; changed in place.
        parallel_dims: Meshes of the run.
        training: torchtitan's TrainingConfig.
        options: Other arguments of `parallelize_deepseekv3`.

    Returns:
        The model.
    """
    replicated = ["dp_replicate"] if parallel_dims.dp_replicate_enabled else []
    offload = CPUOffloadPolicy() if training.enable_cpu_offload else OffloadPolicy()
    # A residual connection has no parameters.
    streams = [module for module in streams_of(model) if any(True for _ in module.parameters())]
    if streams:
        fully_shard(
            streams,
            mesh=parallel_dims.get_mesh([*replicated, "fsdp"]),
            mp_policy=MixedPrecisionPolicy(),
            offload_policy=offload,
        )
    parallelized: nn.Module = parallelize_deepseekv3(
        model, parallel_dims=parallel_dims, training=training, **options
    )
    return parallelized


def streams_of(model: nn.Module) -> list[nn.Module]:
    """Return the connections of every block of a model or stage, in depth order."""
    # Activation checkpointing wraps a block; the wrapper passes attributes on.
    return [cast(nn.Module, block.streams) for block in model.get_submodule("layers").children()]


def gather(streams: Iterable[nn.Module]) -> None:
    """All-gather the parameters of connections that FSDP has sharded, unless they are gathered.

    Hooks of FSDP on the connections would do so inside of the graphs that torchtitan compiles,
    one per block, and a graph cannot contain them.
    """
    for module in streams:
        if isinstance(module, FSDPModule):
            module.unshard()
