"""Facts that torchrun tells each process of a run through environment variables."""

import os
import sys
from typing import NoReturn

from manifold_hc.errors import ConfigError
from manifold_hc.parallel.config import ParallelConfig


def require_world_size(config: ParallelConfig) -> None:
    """Raise ConfigError unless as many processes were started as the degrees need."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started == config.size:
        return
    if config.size == 1:
        raise ConfigError(
            f"parallel: {started} processes were started but nothing says how they share the run; "
            f"give degrees that multiply to {started}, such as parallel.shard={started}"
        )
    raise ConfigError(
        f"parallel: {config} needs {config.size} processes but {started} "
        f"{'was' if started == 1 else 'were'} started; start {config.size} with "
        f"torchrun --nproc-per-node {config.size} -m manifold_hc train ..., "
        f"or give degrees that multiply to {started}"
    )


def is_rank0() -> bool:
    """Return True in the process of rank 0, which prints and logs; needs no process group."""
    return os.environ.get("RANK", "0") == "0"


def is_restarted() -> bool:
    """Return True if torchrun has restarted this process after a failure on its node."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def job_id() -> str:
    """Return the identity of this torchrun job, the same after a restart."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    # Without --rdzv-id the name is "none" for every job, but the agent outlives its workers.
    return name if name != "none" else f"child of {os.getppid()}"


def end_process() -> NoReturn:
    """End this process with status 0 and skip the teardown of the interpreter.

    A gloo thread may still hold a tensor of the last collective; releasing it while the interpreter
    shuts down aborts the process (github.com/pytorch/pytorch/pull/179291).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
