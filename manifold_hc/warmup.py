"""Compile and choose ahead of the first step, so that it takes as long as the others."""

import logging
import math
import time
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from manifold_hc.config import ConnectionConfig
from manifold_hc.connection import Branch
from manifold_hc.errors import ConfigError, DtypeError
from manifold_hc.kernels import OPERATORS, pick
from manifold_hc.kernels.fusion import fuse
from manifold_hc.recompute import Recompute
from manifold_hc.stack import Stack

logger = logging.getLogger("manifold_hc")

TOKENS = 2

DEPTH = 4
"""Sublayers in a row that are timed: three boundaries."""

ROUNDS, SECONDS = 3, 0.1
"""Times that each form's turn comes, and how long it then runs at least."""

MARGIN = 1.05
"""By how much one pass must be slower before it is given up: repetitions differ by less."""


@torch.inference_mode(False)  # where it is on, nothing would record the gradients
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
) -> None:
    """Build or compile every kernel that a network of such connections will need.

    dtype: the streams', as they leave the embedding; branch_dtype: what the branches return where
    that differs, as under autocast; sublayers and recompute: the stack's, which matter where
    backward rebuilds. One call serves any number of tokens, training and inference, norms given or
    not.
    tokens: how many a step will have on this device. Given, it is measured whether what lies
    between two sublayers is slower in one pass, as it is computed otherwise, than with the streams
    written first; then from now on such streams are written first. What was found is logged. It
    takes about a second, and the memory of four sublayers.
    Nothing but that choice and the kernels' caches changes. Raises BackendError where the
    configuration names a backend that cannot serve, DtypeError for integers, ConfigError for a
    device that is not there or tokens < 1.
    """
    start = time.perf_counter()
    for name, chosen in (("dtype", dtype), ("branch_dtype", branch_dtype or dtype)):
        if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point:
            raise DtypeError(
                f"warmup: {name} must be a real floating-point torch.dtype but is {chosen!r}; "
                "take the one that your streams have"
            )
    if tokens is not None and tokens < 1:
        raise ConfigError(f"warmup: tokens must be at least 1 but is {tokens}")
    try:
        device = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"warmup: torch finds no device {device}: {reason}") from error
    stack = _fresh(device, channels, config, sublayers, recompute)

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
    if tokens is not None and stack.config.is_one_pass:
        h = torch.ones(tokens, channels, dtype=dtype, device=device, requires_grad=True)
        with torch.enable_grad():
            _choose(_fresh(device, channels, config, DEPTH), h, branch)


def _fresh(device: torch.device, *arguments: Any) -> Stack:
    """A new stack; its parameters are drawn, but a run's own random numbers stay as they are."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        return Stack(*arguments).to(device)


def _choose(stack: Stack, h: Tensor, branch: Branch) -> None:
    """Time both forms of a boundary in turn, forward and backward, and keep the faster."""
    from torch.utils.benchmark import Timer  # which waits for a GPU

    def run() -> None:
        out = stack(h, [branch] * DEPTH)
        torch.autograd.grad(out, [h, *stack.parameters()], torch.ones_like(out), allow_unused=True)

    config = stack.config
    if pick("boundary", config.backend, config.n, [h]) is OPERATORS["boundary", "reference"]:
        return  # which writes first in any case
    size = (h.device.type, h.dtype, config.n, h.shape[-1], config.single_pass)
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    seconds, chosen = {True: math.inf, False: math.inf}, True
    try:
        for _, one_pass in product(range(ROUNDS), (True, False)):
            fuse(*size, one_pass)
            timer.timeit(1)
            median = timer.blocked_autorange(min_run_time=SECONDS).median
            seconds[one_pass] = min(seconds[one_pass], median)
        chosen = seconds[True] <= MARGIN * seconds[False]
    finally:
        fuse(*size, chosen)
    logger.info(
        "between sublayers, %d tokens of %s x %d %s on %s: in one pass %.3g ms, written first "
        "%.3g ms; from now on %s",
        *(h.shape[0], config.n, h.shape[-1], str(h.dtype).removeprefix("torch."), h.device),
        *(1e3 * seconds[form] / DEPTH for form in (True, False)),
        "in one pass" if chosen else "written first",
    )
