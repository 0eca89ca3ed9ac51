"""AdamW with named parameter groups, and the learning-rate schedule."""

import math

import torch
from torch import nn

from manifold_hc.maps import LearnedExit, Maps
from manifold_hc.models.experts import RoutedExperts, Router
from manifold_hc.training.config import OptimizerConfig

GROUPS = {
    "embedding": (nn.Embedding,),
    "connections": (Maps, LearnedExit),
    "router": (Router,),
    "experts": (RoutedExperts,),
    "norms": (nn.RMSNorm, nn.LayerNorm),
}
"""Parameter groups by the class of the module that holds a parameter; others are "layers"."""


def build(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Build AdamW over named groups: matrices decay; norms, gates and static coefficients do not.

    HC decays its dynamic part only (arXiv 2409.19606, section 3); DeepSeek-V4 separates the static
    biases and gates of mHC from the matrices (arXiv 2606.19348); `phi` is a matrix.
    """
    groups = [
        {
            "name": name,
            "params": parameters,
            "weight_decay": config.weight_decay if parameters[0].ndim >= 2 else 0.0,
        }
        for name, parameters in parameter_groups(model).items()
    ]
    fused = all(p.device.type in ("cpu", "cuda", "mps") for p in model.parameters())
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def parameter_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return the trainable parameters by group; vectors have groups of their own.

    For example "connections" and "connections, vectors".
    """
    groups: dict[str, list[nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        name = next((n for n, kinds in GROUPS.items() if isinstance(module, kinds)), "layers")
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            group = name if parameter.ndim >= 2 or name == "norms" else f"{name}, vectors"
            groups.setdefault(group, []).append(parameter)
    return groups


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Return the learning rate of `step`, counted from 0, in a run of `steps`.

    Linear warm-up over `config.warmup` steps, then `config.schedule`. The paper's "step" schedule
    has 0.316 of the base rate from 80 % of the steps on and 0.1 from 90 % on.
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
