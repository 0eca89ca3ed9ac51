"""One optimizer step, and what to say when a number in it is not finite."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from manifold_hc.data import Batch
from manifold_hc.data.batches import NO_TARGET
from manifold_hc.errors import DivergedError
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
    """Forward, backward and update for one batch; counts it in `state`.

    Raises DivergedError at a loss or gradient that is not finite, before any weight has moved.
    """
    model, rate = state.model, learning_rate(state.step, config.training.steps, config.optimizer)
    targets = max(1, int((batch.targets != NO_TARGET).sum()))
    loss = torch.zeros((), device=state.device)
    for piece in batch.pieces(config.training.accumulate):
        share = int((piece.targets != NO_TARGET).sum()) / targets
        if share:
            part = loss_of(model, piece, config.training.precision) * share
            part.backward()
            loss += part.detach()
    if not math.isfinite(loss.item()):
        raise DivergedError(state.step, "loss", _first_infinite_layer(state, batch, config))
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    # Before clipping, which spreads one gradient's NaN over all of them.
    if not math.isfinite(norm.item()):
        raise DivergedError(state.step, "gradient norm", _first_infinite_gradient(state))
    nn.utils.clip_grads_with_norm_(model.parameters(), config.optimizer.clip or math.inf, norm)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.step += 1
    state.sequences += len(batch.inputs)
    return StepFigures(loss.item(), norm.item(), rate)


def loss_of(model: nn.Module, batch: Batch, precision: str = "float32") -> Tensor:
    """Mean cross-entropy over the targets of a batch in nats a token, in float32."""
    bfloat16 = precision == "bfloat16"
    with torch.autocast(batch.inputs.device.type, dtype=torch.bfloat16, enabled=bfloat16):
        logits = model(batch.inputs, batch.documents)
    return cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten())


def _first_infinite_gradient(state: TrainState) -> str:
    names = {parameter: name for name, parameter in state.model.named_parameters()}
    for group in state.optimizer.param_groups:
        bad = [p for p in group["params"] if p.grad is not None and not p.grad.isfinite().all()]
        if bad:
            return (
                f"parameter group {group['name']!r} "
                f"({names[bad[0]]}, {len(bad)} of {len(group['params'])} tensors)"
            )
    return "the norm over all groups, while every gradient is finite"


@torch.no_grad()
def _first_infinite_layer(state: TrainState, batch: Batch, config: RunConfig) -> str:
    """Runs the batch again and watches every layer that has parameters of its own."""
    names = {module: name for name, module in state.model.named_modules()}
    groups = {p: group["name"] for group in state.optimizer.param_groups for p in group["params"]}
    found: list[nn.Module] = []

    def watch(module: nn.Module, _: object, output: object) -> None:
        tensors = output if isinstance(output, tuple) else (output,)
        if not all(bool(t.isfinite().all()) for t in tensors if isinstance(t, Tensor)):
            found.append(module)

    own = [m for m in state.model.modules() if next(m.parameters(recurse=False), None) is not None]
    handles = [module.register_forward_hook(watch) for module in own]
    try:
        for piece in batch.pieces(config.training.accumulate):
            loss_of(state.model, piece, config.training.precision)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        return "the loss itself, while every layer's output is finite"
    group = groups[next(found[0].parameters(recurse=False))]
    return f"parameter group {group!r} (output of {names[found[0]]})"
