"""Validation loss."""

import torch

from manifold_hc.data import Batches
from manifold_hc.training.batch_slice import rank_slice
from manifold_hc.training.state import TrainState
from manifold_hc.training.step import count_targets, loss_of


@torch.no_grad()
def validate(state: TrainState, batches: Batches) -> float:
    """Return the mean loss over `training.validation_batches`, or over one epoch if shorter."""
    model, processes, training = state.model, state.processes, state.config.training
    model.eval()
    epoch = max(1, batches.count // batches.batch)
    loss = torch.zeros((), dtype=torch.float64, device=state.device)
    targets = torch.zeros((), dtype=torch.int64, device=state.device)
    for number in range(min(training.validation_batches, epoch)):
        with processes.phase(f"validation batch {number}"):
            batch = rank_slice(batches, number * batches.batch, processes)
            for microbatch in batch.to(state.device).microbatches(training.accumulate):
                count = count_targets(microbatch.targets)
                loss += loss_of(model, microbatch, training.precision).double() * count
                targets += count
    model.train()
    # Only ranks with the last stage have a loss, but every stage counts the targets: the loss is
    # summed over all ranks, the targets over the ranks of one stage.
    total = processes.all_reduce(loss).item()
    return total / max(1, processes.all_reduce_data(targets).item())
