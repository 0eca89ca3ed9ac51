"""Compile ahead of the first step, so that it takes as long as the others."""

import logging
import time
from itertools import product

import torch
from torch import Tensor, nn

from manifold_hc.connection import ConnectionConfig
from manifold_hc.errors import ConfigError, DtypeError
from manifold_hc.recompute import Recompute
from manifold_hc.stack import Stack

logger = logging.getLogger("manifold_hc")

TOKENS = 2


def warmup(
    channels: int,
    config: ConnectionConfig | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    branch_dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    sublayers: int = 2,
    recompute: Recompute = None,
) -> None:
    """Build or compile every kernel that a network of such connections will need.

    dtype: the streams', as they leave the embedding; branch_dtype: what the branches return where
    that differs, as under autocast; sublayers and recompute: the stack's, which matter where
    backward rebuilds. One call serves any number of tokens, training and inference, norms given or
    not.
    Nothing but the kernels' caches changes. Raises BackendError where the configuration names a
    backend that cannot serve, DtypeError for integers, ConfigError for a device that is not there.
    """
    start = time.perf_counter()
    for name, chosen in (("dtype", dtype), ("branch_dtype", branch_dtype or dtype)):
        if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point:
            raise DtypeError(
                f"warmup: {name} must be a real floating-point torch.dtype but is {chosen!r}; "
                "take the one that your streams have"
            )
    try:
        device = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"warmup: torch finds no device {device}: {reason}") from error
    # The parameters of a fresh stack are drawn; a run's own random numbers stay as they are.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        stack = Stack(channels, config, sublayers, recompute).to(device)

    def branch(u: Tensor) -> Tensor:
        return u.to(branch_dtype or dtype)

    norm = nn.RMSNorm(channels, eps=1e-6, device=device, dtype=dtype)
    for training, norms in product((True, False), (None, [norm] * sublayers)):
        with torch.set_grad_enabled(training):
            h = torch.ones(TOKENS, channels, dtype=dtype, device=device, requires_grad=training)
            out = stack(h, [branch] * sublayers, norms)
            if training:
                out.sum().backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    logger.info("kernels are warm after %.1f s", time.perf_counter() - start)
