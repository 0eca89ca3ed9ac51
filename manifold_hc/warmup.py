"""Compilation and timing of the kernels before the first training step."""

import logging
import math
import time
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from manifold_hc.config import ConnectionConfig, Recompute, require_config
from manifold_hc.connection import Branch
from manifold_hc.errors import ConfigError, DtypeError, require_integer
from manifold_hc.kernels import pick
from manifold_hc.stack import Stack

logger = logging.getLogger("manifold_hc")

TOKENS = 2
"""Tokens of the passes that compile the kernels."""

DEPTH = 4
"""Sublayers of the stacks that are timed: three boundaries."""

ROUNDS, SECONDS = 3, 0.1
"""Rounds in which both forms of a boundary take turns, and the least time of each turn."""

MARGIN = 1.05
"""Ratio above which the fused form counts as slower: repetitions differ by less."""


class Advice(NamedTuple):
    """Measured costs of a boundary between two sublayers, and the faster form."""

    fuse_boundaries: bool
    """Value for `ConnectionConfig.fuse_boundaries`."""
    fused_seconds: float | None = None
    """Forward and backward of one sublayer's connection, fused; None if it was not measured."""
    separate_seconds: float | None = None
    """The same with the write as an operator of its own."""


@torch.inference_mode(False)  # inference mode would record no gradients
def warmup(
    channels: int,
    config: ConnectionConfig | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    branch_dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    sublayers: int = 2,
    recompute: Recompute = None,
    tokens: int | None = None,
) -> Advice:
    """Build or compile every kernel that a network of such connections needs.

    One call covers any number of tokens, training and inference, with norms and without. It
    changes nothing but the kernels' caches.

    Args:
        channels: Channels C of a stream.
        config: The connections' configuration; None for the default one.
        dtype: Dtype of the streams, as they leave the embedding.
        branch_dtype: Dtype of the branches' outputs if it differs, as under autocast.
        device: Device of the network.
        sublayers: Number of sublayers of the stack, which matters with recompute.
        recompute: The stack's recompute; see `Stack`.
        tokens: Tokens of a step on this device. If given, the fused form of the boundary between
            two sublayers is timed against the separate one, which takes about a second and the
            memory of four sublayers.

    Returns:
        The advice for `ConnectionConfig.fuse_boundaries`, with the measured seconds if `tokens` was
        given and there are two forms to choose from; else the configuration's own value.

    Raises:
        BackendError: If the configured backend does not support the call.
        DtypeError: For integer dtypes.
        ConfigError: For a device that torch does not find, or tokens < 1.

    Example:
        >>> import dataclasses, manifold_hc as mhc
        >>> config = mhc.ConnectionConfig()
        >>> advice = mhc.warmup(64, config, tokens=128)
        >>> config = dataclasses.replace(config, fuse_boundaries=advice.fuse_boundaries)
    """
    start = time.perf_counter()
    config = require_config("warmup", config)
    for name, chosen in (("dtype", dtype), ("branch_dtype", branch_dtype or dtype)):
        if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point:
            raise DtypeError(
                f"warmup: {name} must be a real floating-point torch.dtype but is {chosen!r}; "
                "take the one that your streams have"
            )
    if tokens is not None:
        require_integer("warmup", "tokens", tokens, 1)
    try:
        device = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"warmup: torch finds no device {device}: {reason}") from error
    stack = _new_stack(device, channels, config, sublayers, recompute)

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
    if tokens is None or not config.reads_in_kernel:
        return Advice(config.fuse_boundaries)
    h = torch.ones(tokens, channels, dtype=dtype, device=device, requires_grad=True)
    if pick("boundary", config.backend, config.n, [h]) is None:
        return Advice(config.fuse_boundaries)  # the reference has the separate form only
    with torch.enable_grad():
        return _advise(channels, config, h, branch)


def _new_stack(device: torch.device, *arguments: Any) -> Stack:
    """Make a stack without advancing the random state of the run."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        return Stack(*arguments).to(device)


def _advise(channels: int, config: ConnectionConfig, h: Tensor, branch: Branch) -> Advice:
    """Time both forms of a boundary in turns, forward and backward."""
    from torch.utils.benchmark import Timer  # synchronises a GPU

    timers = {}
    for fused in (True, False):
        chosen = replace(config, fuse_boundaries=fused)
        stack = _new_stack(h.device, channels, chosen, DEPTH)

        def run(stack: Stack = stack) -> None:
            out = stack(h, [branch] * DEPTH)
            weights = torch.ones_like(out)
            torch.autograd.grad(out, [h, *stack.parameters()], weights, allow_unused=True)

        timers[fused] = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    seconds = dict.fromkeys(timers, math.inf)
    for _, fused in product(range(ROUNDS), timers):
        timers[fused].timeit(1)
        median = timers[fused].blocked_autorange(min_run_time=SECONDS).median
        seconds[fused] = min(seconds[fused], median / DEPTH)
    advice = _advice_of(seconds[True], seconds[False])
    logger.info(
        "boundary of %d tokens of %d x %d %s on %s: fused %.3g ms, separate %.3g ms; "
        "fuse_boundaries=%s is faster",
        h.shape[0],
        config.n,
        h.shape[-1],
        str(h.dtype).removeprefix("torch."),
        h.device,
        1e3 * seconds[True],
        1e3 * seconds[False],
        advice.fuse_boundaries,
    )
    return advice


def _advice_of(fused_seconds: float, separate_seconds: float) -> Advice:
    """Advise the fused form unless it is slower by more than `MARGIN`."""
    fuse = fused_seconds <= MARGIN * separate_seconds
    return Advice(fuse, fused_seconds, separate_seconds)
