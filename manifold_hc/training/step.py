"""One optimizer step, and what to say when a number in it is not finite."""

import math
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from manifold_hc.data import Batch
from manifold_hc.data.batches import NO_TARGET
from manifold_hc.errors import DivergedError
from manifold_hc.parallel import Pipeline, Processes, by_mesh, local
from manifold_hc.training.config import RunConfig, TrainingConfig
from manifold_hc.training.optimizer import learning_rate
from manifold_hc.training.state import TrainState


class StepFigures(NamedTuple):
    """What a step was like."""

    loss: float
    """Mean over all targets of the step, nats a token."""
    gradient_norm: float
    """Of the whole gradient, before clipping."""
    lr: float


def take_step(state: TrainState, batch: Batch, config: RunConfig) -> StepFigures:
    """Forward, backward and update for one batch, of which each process has its part.

    Counts it in `state`. Raises DivergedError at a loss or gradient that is not finite, before any
    weight has moved.
    """
    model, rate = state.model, learning_rate(state.step, config.training.steps, config.optimizer)
    processes = state.processes
    processes.at(f"step {state.step}, forward and backward")
    targets = max(1, int(processes.all_reduce_data(count_targets(batch.targets))))
    loss = processes.all_reduce(backward(model, batch, targets, config.training))
    if not math.isfinite(loss.item()):
        raise DivergedError(state.step, "loss", _first_infinite_layer(state, batch, config))
    processes.at(f"step {state.step}, update")
    norm = gradient_norm(model, processes)
    # Before clipping, which spreads one gradient's NaN over all of them.
    if not math.isfinite(norm.item()):
        raise DivergedError(state.step, "gradient norm", _first_infinite_gradient(state))
    for parameters in by_mesh(model):
        nn.utils.clip_grads_with_norm_(parameters, config.optimizer.clip or math.inf, norm)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.step += 1
    state.sequences += len(batch.inputs) * processes.dp_size
    return StepFigures(loss.item(), norm.item(), rate)


def backward(model: nn.Module, batch: Batch, targets: int, training: TrainingConfig) -> Tensor:
    """Add up the gradients of a process's part of a batch; returns its share of the loss.

    targets: how many the whole batch has.
    """
    if isinstance(model, Pipeline):
        return model.backward(
            *batch, lambda logits, wanted: mean_loss(logits, wanted) * _share(wanted, targets)
        )
    loss = torch.zeros((), device=batch.inputs.device)
    for piece in batch.pieces(training.accumulate):
        part = loss_of(model, piece, training.precision) * _share(piece.targets, targets)
        part.backward()
        loss += part.detach()
    return loss


def _share(some: Tensor, targets: int) -> float:
    return int(count_targets(some)) / targets


def gradient_norm(model: nn.Module, processes: Processes) -> Tensor:
    """Norm of the whole gradient, the same to the bit for all processes.

    Those of a copy have different parts of it, and all copies have the same.
    """
    norm = nn.utils.get_total_norm(
        [local(p.grad) for p in model.parameters() if p.grad is not None]
    )
    if processes.size == 1:
        return norm
    squares = processes.all_reduce(norm.double().square()) / processes.config.replicate
    return squares.sqrt().to(norm.dtype)


def count_targets(targets: Tensor) -> Tensor:
    """How many of them count."""
    return (targets != NO_TARGET).sum()


def loss_of(model: nn.Module, batch: Batch, precision: str = "float32") -> Tensor:
    """Mean cross-entropy over the targets of a batch in nats a token, in float32.

    0 for a batch that has none, and in a process that has not the last stage of a pipeline.
    """
    bfloat16 = precision == "bfloat16"
    with torch.autocast(batch.inputs.device.type, dtype=torch.bfloat16, enabled=bfloat16):
        logits: Tensor | None = model(batch.inputs, batch.documents)
    if logits is None:
        return torch.zeros((), device=batch.inputs.device)
    return mean_loss(logits, batch.targets)


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Of logits [B, T, V] against targets [B, T], as `loss_of` says."""
    total = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
    return total / count_targets(targets).clamp(min=1)


def _first_infinite_gradient(state: TrainState) -> str:
    names = {parameter: name for name, parameter in state.model.named_parameters()}
    here = {
        group["name"]: {names[p]: _is_infinite(p.grad) for p in group["params"]}
        for group in state.optimizer.param_groups
    }
    groups: dict[str, dict[str, bool]] = {}
    for part in state.processes.all_gather(here):
        for group, tensors in part.items():
            known = groups.setdefault(group, {})
            known |= {name: bad or known.get(name, False) for name, bad in tensors.items()}
    for group, tensors in groups.items():
        if bad := [name for name, is_bad in tensors.items() if is_bad]:
            return f"parameter group {group!r} ({bad[0]}, {len(bad)} of {len(tensors)} tensors)"
    return "the norm over all groups, while every gradient is finite"


def _is_infinite(grad: Tensor | None) -> bool:
    return grad is not None and not bool(local(grad).isfinite().all())


@torch.no_grad()
def _first_infinite_layer(state: TrainState, batch: Batch, config: RunConfig) -> str:
    """Runs the batch again and watches every layer that has parameters of its own."""
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
        for piece in batch.pieces(config.training.accumulate):
            loss_of(model, piece, config.training.precision)
    finally:
        for handle in handles:
            handle.remove()
    # In the order of stages, and of calls in each.
    seen = sorted(chain.from_iterable(state.processes.all_gather(found)), key=lambda one: one[0])
    if not seen:
        return "the loss itself, while every layer's output is finite"
    _, group, name = seen[0]
    return f"parameter group {group!r} (output of {name})"
