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
from collections import deque

import torch
from torch import Tensor

from manifold_hc.errors import OutOfMemoryError

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
        # A tensor may be collected in the middle of anything, here too: what comes back is put
        # aside, and sorted in by whoever has the lock.
        self._returned: deque[mmap.mmap] = deque()
        self._lock = threading.Lock()

    def tensor(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Arbitrary content of `like`'s dtype; its block comes back when the last view is gone."""
        size = torch.Size(shape).numel() * like.dtype.itemsize
        block = self._take(-(-size // PAGE) * PAGE)
        own = (ctypes.c_char * size).from_buffer(block, -_address(block) % PAGE)
        # Nothing needs to come back when the process ends.
        weakref.finalize(own, self._give_back, block).atexit = False
        memory = torch.frombuffer(own, dtype=like.dtype).untyped_storage()
        # No view of another tensor: autograd would not let those be changed in place.
        return like.new_empty(0).set_(memory, 0, shape)  # type: ignore[call-overload]

    def kept(self) -> int:
        """Bytes that are mapped and unused."""
        return sum(map(len, self._free))

    def release(self) -> None:
        """Hand all unused memory back to the system."""
        with self._lock:
            self._sort_in()
            self._free.clear()

    def _take(self, size: int) -> mmap.mmap:
        with self._lock:
            self._sort_in()
            for index in range(len(self._free) - 1, -1, -1):  # what was freed last is in cache
                if len(self._free[index]) == size + PAGE:
                    return self._free.pop(index)
        block = self._map(size + PAGE)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a system without them
                block.madvise(mmap.MADV_HUGEPAGE)
        return block

    def _map(self, size: int) -> mmap.mmap:
        """New memory; what is kept goes back to the system before that is given up."""
        try:
            return _mapped(size)
        except OSError:
            self.release()
        try:
            return _mapped(size)
        except OSError as error:
            raise OutOfMemoryError(
                f"the CPU kernels found no memory for a result of {size >> 20} MiB: {error}; "
                "use fewer tokens, or free some memory"
            ) from error

    def _give_back(self, block: mmap.mmap) -> None:
        self._returned.append(block)
        if self._lock.acquire(blocking=False):
            try:
                self._sort_in()
            finally:
                self._lock.release()

    def _sort_in(self) -> None:
        while self._returned:
            self._free.append(self._returned.popleft())
        while self.kept() > self.limit:
            self._free.pop(0)


def _mapped(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _address(block: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(block))


BLOCKS = Blocks(KEEP)
"""Of this process. A limit of 0 leaves all results to torch's allocator."""


def empty(like: Tensor, *shape: int) -> Tensor:
    """A new tensor of `like`'s dtype, in memory that is kept if it is large."""
    large = torch.Size(shape).numel() * like.dtype.itemsize >= LARGE
    return BLOCKS.tensor(like, shape) if large and BLOCKS.limit else like.new_empty(shape)
