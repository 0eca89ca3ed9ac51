"""Processes agree on a new name, whatever dead ones have left in the store."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from manifold_hc.errors import LostProcessError
from manifold_hc.parallel.rendezvous import agree_on_prefix


def store():
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def meet(known, size):
    with ThreadPoolExecutor(size) as pool:
        clients = [known.clone() for _ in range(size)]
        return list(pool.map(lambda r: agree_on_prefix(clients[r], r, size, 20.0), range(size)))


def test_every_meeting_has_a_name_of_its_own():
    known = store()
    names = []
    for size in (3, 2, 3, 1, 3):
        found = meet(known, size)
        assert len(set(found)) == 1
        names.append(found[0])
    assert len(set(names)) == 5


def test_what_dead_processes_have_written_is_not_followed():
    """Of a first process that had answered, and of another that had agreed to its name."""
    known = store()
    for rank in (1, 2):
        known.set(f"token {rank}", "dead")
        known.set(f"answer {rank}", "dead old")
        known.set(f"agreed {rank}", "old")
    found = meet(known, 3)
    assert len(set(found)) == 1
    assert found[0] != "old"


def test_who_does_not_come_is_named():
    with pytest.raises(LostProcessError, match=r"^parallel: processes \[1, 2\] have not come$"):
        agree_on_prefix(store(), 0, 3, 0.2)
    with pytest.raises(LostProcessError, match=r"^parallel: the first process has not come$"):
        agree_on_prefix(store(), 1, 3, 0.2)
