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
from manifold_hc.parallel import Processes, by_mesh, local
from manifold_hc.training.config import RunConfig
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
    targets = max(1, int(processes.summed(count_targets(batch))))
    loss = torch.zeros((), device=state.device)
    for piece in batch.pieces(config.training.accumulate):
        share = int(count_targets(piece)) / targets
        part = loss_of(model, piece, config.training.precision) * share
        part.backward()
        loss += part.detach()
    loss = processes.summed(loss)
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
    state.sequences += len(batch.inputs) * processes.parts
    return StepFigures(loss.item(), norm.item(), rate)


def gradient_norm(model: nn.Module, processes: Processes) -> Tensor:
    """Norm of the whole gradient, the same to the bit for all processes.

    Those of a copy have different parts of it, and all copies have the same.
    """
    norm = nn.utils.get_total_norm(
        [local(p.grad) for p in model.parameters() if p.grad is not None]
    )
    if processes.size == 1:
        return norm
    squares = processes.summed(norm.double().square()) / processes.config.replicate
    return squares.sqrt().to(norm.dtype)


def count_targets(batch: Batch) -> Tensor:
    """How many tokens of a batch count."""
    return (batch.targets != NO_TARGET).sum()


def loss_of(model: nn.Module, batch: Batch, precision: str = "float32") -> Tensor:
    """Mean cross-entropy over the targets of a batch in nats a token, in float32.

    0 for a batch that has none.
    """
    bfloat16 = precision == "bfloat16"
    with torch.autocast(batch.inputs.device.type, dtype=torch.bfloat16, enabled=bfloat16):
        logits = model(batch.inputs, batch.documents)
    total = cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), reduction="sum")
    return total / count_targets(batch).clamp(min=1)


def _first_infinite_gradient(state: TrainState) -> str:
    names = {parameter: name for name, parameter in state.model.named_parameters()}
    for group in state.optimizer.param_groups:
        found = [
            names[p]
            for p in group["params"]
            if p.grad is not None and not local(p.grad).isfinite().all()
        ]
        anywhere = set(chain.from_iterable(state.processes.gathered(found)))
        if bad := [names[p] for p in group["params"] if names[p] in anywhere]:
            return (
                f"parameter group {group['name']!r} "
                f"({bad[0]}, {len(bad)} of {len(group['params'])} tensors)"
            )
    return "the norm over all groups, while every gradient is finite"


@torch.no_grad()
def _first_infinite_layer(state: TrainState, batch: Batch, config: RunConfig) -> str:
    """Runs the batch again and watches every layer that has parameters of its own."""
    own = {
        name: [f"{name}.{parameter}" for parameter, _ in module.named_parameters(recurse=False)]
        for name, module in state.model.named_modules()
    }
    parameters = dict(state.model.named_parameters())
    groups = {p: group["name"] for group in state.optimizer.param_groups for p in group["params"]}
    group_of = {name: groups[parameters[held[0]]] for name, held in own.items() if held}
    found: list[str] = []

    def watch(name: str, output: object) -> None:
        tensors = output if isinstance(output, tuple) else (output,)
        if not all(bool(t.isfinite().all()) for t in tensors if isinstance(t, Tensor)):
            found.append(name)

    handles = [
        state.model.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: watch(name, output)
        )
        for name in group_of
    ]
    try:
        for piece in batch.pieces(config.training.accumulate):
            loss_of(state.model, piece, config.training.precision)
    finally:
        for handle in handles:
            handle.remove()
    seen = [names for names in state.processes.gathered(found) if names]
    if not seen:
        return "the loss itself, while every layer's output is finite"
    return f"parameter group {group_of[seen[0][0]]!r} (output of {seen[0][0]})"
