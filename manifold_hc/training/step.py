"""One optimizer step, and the diagnosis of a loss or gradient that is not finite."""

import math
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from manifold_hc.data import Batch
from manifold_hc.data.batches import NO_TARGET
from manifold_hc.errors import DivergedError
from manifold_hc.parallel import Pipeline, Processes, local_shard, parameters_by_mesh
from manifold_hc.training.config import RunConfig, TrainingConfig
from manifold_hc.training.optimizer import learning_rate
from manifold_hc.training.state import TrainState


class StepFigures(NamedTuple):
    """Figures of one optimizer step."""

    loss: float
    """Mean over all targets of the batch, in nats per token."""
    gradient_norm: float
    """Norm of the whole gradient before clipping."""
    lr: float
    """Learning rate."""


def take_step(state: TrainState, batch: Batch, config: RunConfig) -> StepFigures:
    """Run forward, backward and update for one batch, of which each rank has its slice.

    Advances `state`. Raises DivergedError at a loss or gradient that is not finite, before any
    weight has changed.
    """
    model, rate = state.model, learning_rate(state.step, config.training.steps, config.optimizer)
    processes = state.processes
    with processes.phase("forward and backward"):
        # Number of targets of the whole batch: every rank divides its sum of losses by it, so that
        # losses and gradients are summed over ranks, and documents of any length weigh alike.
        targets = max(1, int(processes.all_reduce_data(count_targets(batch.targets))))
        loss = processes.all_reduce(backward(model, batch, targets, config.training))
        if not math.isfinite(loss.item()):
            raise DivergedError(state.step, "loss", _first_infinite_layer(state, batch, config))
    with processes.phase("update"):
        norm = gradient_norm(model, processes)
        # Before clipping, which spreads one gradient's NaN over all of them.
        if not math.isfinite(norm.item()):
            raise DivergedError(state.step, "gradient norm", _first_infinite_gradient(state))
        for parameters in parameters_by_mesh(model):
            nn.utils.clip_grads_with_norm_(parameters, config.optimizer.clip or math.inf, norm)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        state.optimizer.step()
        state.optimizer.zero_grad()
    state.step += 1
    state.sequences += len(batch.inputs) * processes.dp_size
    return StepFigures(loss.item(), norm.item(), rate)


def backward(model: nn.Module, batch: Batch, targets: int, training: TrainingConfig) -> Tensor:
    """Accumulate the gradients of this rank's slice of a batch; return its summand of the loss.

    targets: number of targets in the whole batch.
    """
    if isinstance(model, Pipeline):
        return model.backward(
            *batch, lambda logits, chosen: mean_loss(logits, chosen) * _weight(chosen, targets)
        )
    loss = torch.zeros((), device=batch.inputs.device)
    for microbatch in batch.microbatches(training.accumulate):
        mean = loss_of(model, microbatch, training.precision)
        summand = mean * _weight(microbatch.targets, targets)
        summand.backward()
        loss += summand.detach()
    return loss


def _weight(some: Tensor, targets: int) -> float:
    """Weight of a microbatch's mean loss in the mean over all targets of the batch."""
    return int(count_targets(some)) / targets


def gradient_norm(model: nn.Module, processes: Processes) -> Tensor:
    """Return the norm of the whole gradient, the same bits on all ranks."""
    norm = nn.utils.get_total_norm(
        [local_shard(p.grad) for p in model.parameters() if p.grad is not None]
    )
    if processes.size == 1:
        return norm
    # Ranks of a replica hold disjoint shards of the gradient, and every replica holds all of it:
    # the sum of squares over all ranks counts it once per replica.
    squares = processes.all_reduce(norm.double().square()) / processes.config.replicate
    return squares.sqrt().to(norm.dtype)


def count_targets(targets: Tensor) -> Tensor:
    """Return the number of targets, padding excluded."""
    return (targets != NO_TARGET).sum()


def loss_of(model: nn.Module, batch: Batch, precision: str = "float32") -> Tensor:
    """Return the mean cross-entropy of a batch in nats per token, in float32.

    0 for a batch without targets, and on a rank without the last stage of a pipeline.
    """
    bfloat16 = precision == "bfloat16"
    with torch.autocast(batch.inputs.device.type, dtype=torch.bfloat16, enabled=bfloat16):
        logits: Tensor | None = model(batch.inputs, batch.documents)
    if logits is None:
        return torch.zeros((), device=batch.inputs.device)
    return mean_loss(logits, batch.targets)


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of logits [B, T, V] over targets [B, T], in float32."""
    total = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
    return total / count_targets(targets).clamp(min=1)


def _first_infinite_gradient(state: TrainState) -> str:
    """Describe the first parameter group with a gradient that is not finite; a collective call."""
    names = {parameter: name for name, parameter in state.model.named_parameters()}
    local = {
        group["name"]: {names[p]: _is_infinite(p.grad) for p in group["params"]}
        for group in state.optimizer.param_groups
    }
    groups: dict[str, dict[str, bool]] = {}
    for rank_groups in state.processes.all_gather(local):
        for group, tensors in rank_groups.items():
            known = groups.setdefault(group, {})
            known |= {name: bad or known.get(name, False) for name, bad in tensors.items()}
    for group, tensors in groups.items():
        if bad := [name for name, is_bad in tensors.items() if is_bad]:
            return f"parameter group {group!r} ({bad[0]}, {len(bad)} of {len(tensors)} tensors)"
    return "the norm over all groups, while every gradient is finite"


def _is_infinite(grad: Tensor | None) -> bool:
    return grad is not None and not bool(local_shard(grad).isfinite().all())


@torch.no_grad()
def _first_infinite_layer(state: TrainState, batch: Batch, config: RunConfig) -> str:
    """Rerun the batch with hooks; describe the first layer with an output that is not finite."""
    model = state.model
    own = {
        name: [f"{name}.{parameter}" for parameter, _ in module.named_parameters(recurse=False)]
        for name, module in model.named_modules()
    }
    parameters = dict(model.named_parameters())
    groups = {p: group["name"] for group in state.optimizer.param_groups for p in group["params"]}
    group_of = {
        name: groups.get(parameters[held[0]], "untrained") for name, held in own.items() if held
    }
    found: list[tuple[int, str, str]] = []

    def watch(name: str, output: object) -> None:
        tensors = output if isinstance(output, tuple) else (output,)
        if not all(bool(t.isfinite().all()) for t in tensors if isinstance(t, Tensor)):
            stage = model.running if isinstance(model, Pipeline) else 0
            found.append((stage, group_of[name], name))

    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: watch(name, output)
        )
        for name in group_of
    ]
    try:
        for microbatch in batch.microbatches(config.training.accumulate):
            loss_of(model, microbatch, config.training.precision)
    finally:
        for handle in handles:
            handle.remove()
    # Sorted by stage; within a stage in the order of calls.
    seen = sorted(
        chain.from_iterable(state.processes.all_gather(found)), key=lambda found: found[0]
    )
    if not seen:
        return "the loss itself, while every layer's output is finite"
    _, group, name = seen[0]
    return f"parameter group {group!r} (output of {name})"
