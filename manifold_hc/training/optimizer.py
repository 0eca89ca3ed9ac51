"""AdamW with decay where it belongs, and the learning rate of every step."""

import math

import torch
from torch import nn

from manifold_hc.training.config import OptimizerConfig


def build(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over two groups: matrices decay; norms, gates and static coefficients do not.

    HC decays its dynamic part only (arXiv 2409.19606, section 3), DeepSeek-V4 keeps the static
    biases and gates of mHC apart from the matrices (arXiv 2606.19348); `phi` is a matrix.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=_can_fuse(parameters)
    )


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """The rate of `step`, counted from 0, in a run of `steps`.

    Linear warm-up over `config.warmup` steps, then by `config.schedule`: "step" is the paper's,
    0.316 of the base rate from 80 % of the steps on and 0.1 from 90 % on.
    """
    warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    if config.schedule == "step":
        level = 1.0 if step < 0.8 * steps else 0.316 if step < 0.9 * steps else 0.1
    elif config.schedule == "cosine":
        progress = max(0, step - config.warmup) / max(1, steps - config.warmup)
        level = 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, progress)))
    else:
        level = 1.0
    return config.lr * warm * level


def _can_fuse(parameters: list[nn.Parameter]) -> bool:
    return all(p.device.type in ("cpu", "cuda", "mps") for p in parameters)
