"""How the processes of a run agree on a name that no earlier attempt has used.

The store that torchrun keeps outlives its processes: what dead ones have written is still there,
and how often processes were started again, each node counts for itself. So every process writes a
word of its own, new every time, and follows only who answers with it.
"""

import time
import uuid

from torch.distributed.distributed_c10d import Store

from manifold_hc.errors import LostProcessError

PAUSE = 0.05
"""Seconds between two looks at the store."""


def agree_on_prefix(store: Store, rank: int, size: int, timeout: float) -> str:
    """A name for this meeting, the same for all `size` processes and new.

    Raises LostProcessError when they have not met after `timeout` seconds.
    """
    own, limit = uuid.uuid4().hex, time.monotonic() + timeout
    if rank:
        store.set(f"word {rank}", own)
        while True:
            word, _, name = _read(store, f"answer {rank}").partition(" ")
            if word == own:
                store.set(f"agreed {rank}", name)
                return name
            _pause(limit, "the first process has not come")
    waiting = set(range(1, size))
    while True:
        for other in sorted(waiting):
            if _read(store, f"agreed {other}") == own:
                waiting.remove(other)
            elif word := _read(store, f"word {other}"):
                store.set(f"answer {other}", f"{word} {own}")
        if not waiting:
            return own
        _pause(limit, f"processes {sorted(waiting)} have not come")


def _read(store: Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _pause(limit: float, missing: str) -> None:
    if time.monotonic() > limit:
        raise LostProcessError(f"parallel: {missing}")
    time.sleep(PAUSE)
