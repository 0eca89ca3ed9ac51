"""Everything that a run needs to go on."""

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
from manifold_hc.parallel import Processes, distribute, local
from manifold_hc.training import optimizer as optimizers
from manifold_hc.training.config import RunConfig

GATHERING = "torch.distributed.tensor._redistribute"
"""Warns of weights that are gathered in two steps; copies are the same bits in any number."""


class TrainState:
    """Model, optimizer, random numbers, and how far they are."""

    def __init__(
        self, config: RunConfig, device: torch.device, processes: Processes | None = None
    ) -> None:
        """Draw the state before the first step from `training.seed`; this process's part of it."""
        torch.manual_seed(config.training.seed)
        self.config = config
        self.device = device
        self.processes = processes or Processes()
        training = config.training
        # On the host, so that no device ever holds more than its part and one unit.
        self.model = distribute(
            Decoder(config.model, config.connection, training.recompute),
            self.processes,
            training.torch_precision,
            microbatches=training.accumulate,
            compiled=training.compile,
        ).to(device)
        self.optimizer = optimizers.build(self.model, config.optimizer)
        self.step = 0
        """Optimizer steps taken."""
        self.sequences = 0
        """Sequences seen: the position in the data."""
        self.best = math.inf
        """Lowest validation loss so far."""

    def tensors(self) -> dict[str, Any]:
        """Nested tensors by name, as torch.distributed.checkpoint saves them.

        Of the optimizer what belongs to a weight: what a group has is the configuration's.
        """
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer["state"], "random": self._random()}

    def restore(self, tensors: dict[str, Any]) -> None:
        """Take over what `tensors()` gave; random states of other devices are left out."""
        groups = get_optimizer_state_dict(self.model, self.optimizer)["param_groups"]
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=tensors["model"],
            optim_state_dict={"state": tensors["optimizer"], "param_groups": groups},
        )
        torch.set_rng_state(tensors["random"]["cpu"])
        if (there := tensors["random"].get(self.device.type)) is not None and self._accelerator:
            self._accelerator.set_rng_state(there)

    def improves(self, validation_loss: float | None) -> bool:
        """Whether this is the lowest validation loss so far; remembers it if it is."""
        if validation_loss is None or not validation_loss < self.best:
            return False
        self.best = validation_loss
        return True

    def is_finite(self) -> bool:
        """Whether every weight is; every process must ask."""
        here = all(bool(local(p).isfinite().all()) for p in self.model.parameters())
        return all(self.processes.all_gather(here))

    def weights(self) -> dict[str, torch.Tensor]:
        """All weights whole, on the first process's host; every process must ask."""
        here = {}
        with quiet(GATHERING):
            for name, tensor in self.model.state_dict().items():
                whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                if self.processes.is_first_copy:
                    here[name] = whole.cpu()
        return self.processes.collected(here)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all weights, in every process; every one must ask."""
        here = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        found = self.processes.all_gather_pp(here)
        return {name: shape for part in found for name, shape in part.items()}

    @property
    def _accelerator(self) -> Any:
        return {"cuda": torch.cuda, "mps": torch.mps}.get(self.device.type)

    def _random(self) -> dict[str, torch.Tensor]:
        states = {"cpu": torch.get_rng_state()}
        if self._accelerator:
            states[self.device.type] = self._accelerator.get_rng_state()
        return states
