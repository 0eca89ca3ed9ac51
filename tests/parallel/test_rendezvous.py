"""Processes agree on a new prefix, in spite of keys that dead ones have left in the store."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from manifold_hc.errors import LostProcessError
from manifold_hc.parallel.rendezvous import agree_on_prefix


def store():
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def agree(known, size):
    with ThreadPoolExecutor(size) as pool:
        clients = [known.clone() for _ in range(size)]
        return list(pool.map(lambda r: agree_on_prefix(clients[r], r, size, 20.0), range(size)))


def test_every_rendezvous_has_a_new_prefix():
    known = store()
    prefixes = []
    for size in (3, 2, 3, 1, 3):
        found = agree(known, size)
        assert len(set(found)) == 1
        prefixes.append(found[0])
    assert len(set(prefixes)) == 5


def test_keys_of_dead_processes_are_ignored():
    """Rank 0 had answered, and the others had confirmed its prefix."""
    known = store()
    for rank in (1, 2):
        known.set(f"token {rank}", "dead")
        known.set(f"answer {rank}", "dead old")
        known.set(f"agreed {rank}", "old")
    found = agree(known, 3)
    assert len(set(found)) == 1
    assert found[0] != "old"


def test_missing_processes_are_named():
    with pytest.raises(LostProcessError, match=r"^parallel: processes \[1, 2\] have not come$"):
        agree_on_prefix(store(), 0, 3, 0.2)
    with pytest.raises(LostProcessError, match=r"^parallel: the first process has not come$"):
        agree_on_prefix(store(), 1, 3, 0.2)
