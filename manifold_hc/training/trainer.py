"""The training loop, one process."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from manifold_hc.data import Batches, Split
from manifold_hc.errors import ConfigError, DataError, DivergedError
from manifold_hc.models import Decoder
from manifold_hc.training import optimizer as optimizers
from manifold_hc.training.config import RunConfig
from manifold_hc.training.folder import RunFolder
from manifold_hc.training.progress import ProgressView


class Observer(Protocol):
    """Looks at the model from outside, every `training.probe_every` steps and at the end."""

    name: str
    """The event its records get in the metrics."""

    @property
    def shown(self) -> Mapping[str, str]:
        """What the progress view shows: a label, and the key of a number in the record."""

    def __call__(self, model: nn.Module) -> Mapping[str, Any]:
        """A record for the metrics, JSON-compatible; must leave the model as it is."""


ObserverFactory = Callable[[Tensor], Observer]
"""Makes an observer from the fixed probe batch [B, T] of a run."""


def train(
    config: RunConfig,
    tokens: np.ndarray,
    folder: RunFolder,
    observers: Sequence[ObserverFactory] = (),
    console: Console | None = None,
    title: str = "train",
) -> dict[str, Any]:
    """Train one model on `tokens` [N] and leave metrics, weights and a summary in `folder`.

    Returns the summary. Raises what `check` raises before anything is written, and DivergedError
    at the first loss or gradient norm that is not finite.
    """
    split, device = check(config, tokens)
    torch.manual_seed(config.training.seed)
    model = Decoder(config.model, config.connection).to(device)
    optimizer = optimizers.build(model, config.optimizer)
    size = (config.data.sequence, config.training.batch, config.training.seed)
    batches, held_out = Batches(split.training, *size), Batches(split.validation, *size)
    watching = [make(held_out[0][0].to(device)) for make in observers]

    folder.begin(config)
    limit = config.optimizer.clip or math.inf
    steps, seconds, largest_norm, validation = config.training.steps, [], 0.0, math.nan
    with ProgressView(console or Console(stderr=True), title, steps) as view:
        for step in range(steps):
            start = time.perf_counter()
            rate = optimizers.learning_rate(step, steps, config.optimizer)
            inputs, targets = (tensor.to(device) for tensor in batches[step])

            loss = next_token_loss(model, inputs, targets)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
            record = _finite(step, loss=loss.item(), gradient_norm=norm.item())
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()

            seconds.append(time.perf_counter() - start)
            largest_norm = max(largest_norm, record["gradient_norm"])
            speed = inputs.numel() / seconds[-1]
            record |= {"lr": rate, "seconds": seconds[-1], "tokens_per_second": speed}
            folder.append({"event": "step", "step": step, **record})
            if (step + 1) % config.training.validate_every == 0 or step + 1 == steps:
                validation = validate(model, held_out, config.training.validation_batches)
                folder.append({"event": "validation", "step": step, "loss": validation})
                view.update(step, {"validation": validation})
            if step % config.training.probe_every == 0 or step + 1 == steps:
                for observer in watching:
                    figures = observer(model)
                    folder.append({"event": observer.name, "step": step, **figures})
                    shown = observer.shown.items()
                    view.update(step, {label: figures[key] for label, key in shown})
            seen = {"loss": record["loss"], "norm": record["gradient_norm"], "tokens/s": speed}
            view.update(step, seen)

    folder.save_model(model.state_dict())
    summary = {
        "validation_loss": validation,
        "seconds_per_step": float(np.median(seconds)),
        "largest_gradient_norm": largest_norm,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
    }
    folder.finish(summary)
    return summary


def check(config: RunConfig, tokens: np.ndarray) -> tuple[Split, torch.device]:
    """What a run needs to start, without starting it.

    Raises DataError for a text too short or tokens outside the vocabulary, ConfigError for a
    device that torch does not find.
    """
    split = Split.of(tokens, config.data.sequence, config.data.validation)
    if (largest := int(tokens.max())) >= config.model.vocabulary:
        raise DataError(
            f"data: tokens must be below model.vocabulary={config.model.vocabulary} "
            f"but {largest} is not; give a larger vocabulary"
        )
    return split, find_device(config.training.device)


def next_token_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats a token, in float32; inputs and targets [B, T]."""
    return cross_entropy(model(inputs).flatten(0, 1).float(), targets.flatten())


@torch.no_grad()
def validate(model: nn.Module, batches: Batches, count: int) -> float:
    """Mean loss over the first `count` batches, or over one epoch where that is fewer."""
    device = next(model.parameters()).device
    model.eval()
    numbers = range(min(count, max(1, batches.count // batches.batch)))
    losses = [
        next_token_loss(model, *(tensor.to(device) for tensor in batches[number])).item()
        for number in numbers
    ]
    model.train()
    return sum(losses) / len(losses)


def find_device(name: str) -> torch.device:
    """The device called `name`; "auto" prefers CUDA (or ROCm), then MPS, then the CPU.

    Raises ConfigError for a device that torch does not find.
    """
    found = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(device for device, available in found.items() if available)
    if not found[name]:
        raise ConfigError(f'device: torch finds no {name} here; use device="cpu" or "auto"')
    return torch.device(name)


def _finite(step: int, **figures: float) -> dict[str, float]:
    for name, value in figures.items():
        if not math.isfinite(value):
            raise DivergedError(step, name.replace("_", " "))
    return figures
