"""Training state: all that a checkpoint holds."""

import math
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

from manifold_hc.logs import quiet
from manifold_hc.models import Decoder
from manifold_hc.parallel import Processes, distribute, local_shard
from manifold_hc.training import optimizer as optimizers
from manifold_hc.training.config import RunConfig

REDISTRIBUTE_LOGGER = "torch.distributed.tensor._redistribute"
"""Logger that warns of weights gathered in two steps; the bits do not depend on it."""


class TrainState:
    """Model, optimizer, random states and position in the data."""

    def __init__(
        self, config: RunConfig, device: torch.device, processes: Processes | None = None
    ) -> None:
        """Initialise this rank's part of the state from `training.seed`."""
        torch.manual_seed(config.training.seed)
        self.config = config
        self.device = device
        self.processes = processes or Processes()
        training = config.training
        # Built on the host, so that a device never holds more than its shards and one FSDP unit.
        self.model = distribute(
            Decoder(config.model, config.connection, training.recompute),
            self.processes,
            training.torch_precision,
            microbatches=training.accumulate,
            compiled=training.compile,
        ).to(device)
        self.optimizer = optimizers.build(self.model, config.optimizer)
        self.step = 0
        """Number of optimizer steps taken."""
        self.sequences = 0
        """Number of sequences seen: the position in the data."""
        self.best = math.inf
        """Lowest validation loss so far."""

    def tensors(self) -> dict[str, Any]:
        """Return nested tensors by name, as torch.distributed.checkpoint saves them.

        Of the optimizer only the state per weight: options of groups follow from the configuration.
        """
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer["state"], "random": self._random()}

    def restore(self, tensors: dict[str, Any]) -> None:
        """Restore the tensors of `tensors()`; random states of other devices are ignored."""
        groups = get_optimizer_state_dict(self.model, self.optimizer)["param_groups"]
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=tensors["model"],
            optim_state_dict={"state": tensors["optimizer"], "param_groups": groups},
        )
        torch.set_rng_state(tensors["random"]["cpu"])
        random = tensors["random"].get(self.device.type)
        if random is not None and self._accelerator:
            self._accelerator.set_rng_state(random)

    def record_best(self, validation_loss: float | None) -> bool:
        """Return True, and keep the loss, if it is the lowest validation loss so far."""
        if validation_loss is None or not validation_loss < self.best:
            return False
        self.best = validation_loss
        return True

    def is_finite(self) -> bool:
        """Return True if all weights are finite; a collective call."""
        finite = all(bool(local_shard(p).isfinite().all()) for p in self.model.parameters())
        return all(self.processes.all_gather(finite))

    def weights(self) -> dict[str, torch.Tensor]:
        """Gather all weights unsharded on the host of rank 0; a collective call."""
        weights = {}
        with quiet(REDISTRIBUTE_LOGGER):
            for name, tensor in self.model.state_dict().items():
                # full_tensor is a collective: all ranks call it, one per stage keeps the result.
                whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                if self.processes.is_stage_rank0:
                    weights[name] = whole.cpu()
        return self.processes.gather_tensors_pp(weights)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the global shapes of all weights, on every rank; a collective call."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        stages = self.processes.all_gather_pp(shapes)
        return {name: shape for stage in stages for name, shape in stage.items()}

    @property
    def _accelerator(self) -> Any:
        return {"cuda": torch.cuda, "mps": torch.mps}.get(self.device.type)

    def _random(self) -> dict[str, torch.Tensor]:
        states = {"cpu": torch.get_rng_state()}
        if self._accelerator:
            states[self.device.type] = self._accelerator.get_rng_state()
        return states
