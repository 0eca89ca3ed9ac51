"""Memory for large results, mapped once and used again.

The first touch of a page costs more than the streams' way through memory, and the C library hands
large blocks back to the system whenever they are freed: every training step would pay for all of
its pages anew. So what a freed result leaves behind is kept, up to a limit, for the next one.
"""

import contextlib
import ctypes
import mmap
import threading
import weakref

import torch
from torch import Tensor

LARGE = 4 << 20
"""Bytes from which a result is put into memory that is kept; smaller ones are torch's own."""

KEEP = 1 << 30
"""Bytes kept at most while nobody uses them."""

PAGE = 2 << 20
"""A huge page, on systems that have them: sizes are whole ones."""


class Blocks:
    """Mapped blocks that nobody uses, oldest first."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._free: list[mmap.mmap] = []
        # Re-entrant: a tensor may be collected in the middle of anything.
        self._lock = threading.RLock()

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of arbitrary content; its block comes back when the last view of it is gone."""
        count = torch.Size(shape).numel()
        block = self._take(-(-count * dtype.itemsize // PAGE) * PAGE)
        start = -_address(block) % PAGE
        own = (ctypes.c_char * (count * dtype.itemsize)).from_buffer(block, start)
        # Nothing needs to come back when the process ends.
        weakref.finalize(own, self._give_back, block).atexit = False
        return torch.frombuffer(own, dtype=dtype).view(shape)

    def kept(self) -> int:
        """Bytes that are mapped and unused."""
        return sum(map(len, self._free))

    def release(self) -> None:
        """Hand all unused memory back to the system."""
        with self._lock:
            self._free.clear()

    def _take(self, size: int) -> mmap.mmap:
        with self._lock:
            for index in range(len(self._free) - 1, -1, -1):  # what was freed last is in cache
                if len(self._free[index]) == size + PAGE:
                    return self._free.pop(index)
        block = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a system without them
                block.madvise(mmap.MADV_HUGEPAGE)
        return block

    def _give_back(self, block: mmap.mmap) -> None:
        with self._lock:
            self._free.append(block)
            while self.kept() > self.limit:
                self._free.pop(0)


def _address(block: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(block))


BLOCKS = Blocks(KEEP)
"""Of this process. A limit of 0 leaves all results to torch's allocator."""


def empty(like: Tensor, *shape: int) -> Tensor:
    """A new tensor of `like`'s dtype, in memory that is kept if it is large."""
    large = torch.Size(shape).numel() * like.dtype.itemsize >= LARGE
    return BLOCKS.tensor(shape, like.dtype) if large and BLOCKS.limit else like.new_empty(shape)
