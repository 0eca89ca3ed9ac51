"""Process groups of a run: ranks agree on a new prefix in torchrun's store, then join.

The store outlives the processes that torchrun restarts: keys of dead processes are still in it, and
each node counts restarts on its own. So every process writes a fresh random token, and a rank
follows only an answer that repeats its token.
"""

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from manifold_hc.errors import ConfigError, LostProcessError
from manifold_hc.parallel.config import ParallelConfig
from manifold_hc.parallel.processes import Processes
from manifold_hc.parallel.torchrun import require_world_size
from manifold_hc.parallel.watchdog import Watchdog

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
"""Backends of the process group by the device of the model."""

GRACE = 30.0
"""Seconds from the watchdog's timeout to that of collectives: the watchdog reports first."""

PAUSE = 0.05
"""Seconds between two polls of the store."""


@contextmanager
def join_process_group(config: ParallelConfig, device: torch.device) -> Iterator[Processes]:
    """Join the processes that torchrun has started; a run of one process joins none.

    Raises ConfigError if another number than `config.size` was started or the device cannot be
    shared, and LostProcessError if another process dies.
    """
    require_world_size(config)
    if config.size == 1:
        yield Processes()
        return
    if device.type not in BACKENDS:
        raise ConfigError(
            f"training.device: several processes run on cpu or cuda, not on {device.type}"
        )
    if device.type == "cuda":
        torch.cuda.set_device(dist.get_node_local_rank())
    timeout = timedelta(seconds=config.timeout + GRACE)
    known, rank, size = next(rendezvous("env://", timeout=timeout))
    store = PrefixStore(agree_on_prefix(known, rank, size, config.timeout), known)
    watchdog = Watchdog(store, rank, size, config.timeout)
    try:
        dist.init_process_group(
            BACKENDS[device.type], store=store, rank=rank, world_size=size, timeout=timeout
        )
        mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("all",))
        yield Processes(config, mesh, watchdog)
    except RuntimeError as error:
        # gloo reports a closed connection as a plain RuntimeError.
        if isinstance(error, dist.DistError) or "gloo" in str(error).lower():
            reason = str(error).partition("] ")[2].partition(". This is typically")[0]
            raise LostProcessError(
                f"parallel: another process is gone: {reason or error}"
            ) from error
        raise
    finally:
        # The watchdog first: it would take a slow teardown for a hanging process.
        watchdog.end()
        if dist.is_initialized():
            dist.destroy_process_group()


def agree_on_prefix(store: Store, rank: int, size: int, timeout: float) -> str:
    """Return a new store prefix, the same for all `size` processes.

    Raises LostProcessError if some process does not take part within `timeout` seconds.
    """
    own, limit = uuid.uuid4().hex, time.monotonic() + timeout
    if rank:
        # Rank r writes its token; rank 0 answers "token prefix"; rank r confirms the prefix.
        store.set(f"token {rank}", own)
        while True:
            token, _, prefix = _read(store, f"answer {rank}").partition(" ")
            if token == own:
                store.set(f"agreed {rank}", prefix)
                return prefix
            _pause(limit, "the first process has not come")
    waiting = set(range(1, size))
    while True:
        for other in sorted(waiting):
            if _read(store, f"agreed {other}") == own:
                waiting.remove(other)
            elif token := _read(store, f"token {other}"):
                # Answered at every poll: the token may be one of a dead process.
                store.set(f"answer {other}", f"{token} {own}")
        if not waiting:
            return own
        _pause(limit, f"processes {sorted(waiting)} have not come")


def _read(store: Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _pause(limit: float, missing: str) -> None:
    if time.monotonic() > limit:
        raise LostProcessError(f"parallel: {missing}")
    time.sleep(PAUSE)
