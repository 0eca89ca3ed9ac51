"""Memory for large results, mapped once and used again.

The first touch of a page costs more than reading or writing it, and the C library hands large
blocks back to the system whenever they are freed: every training step would pay for all of its
pages again. So the memory of a freed result is kept, up to a limit, for the next one.
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
"""Smallest result, in bytes, in kept memory; torch allocates smaller ones."""

KEEP = 1 << 30
"""Largest number of unused bytes that are kept."""

PAGE = 2 << 20
"""Size of a huge page: blocks are whole ones."""


class Blocks:
    """Memory blocks for results; unused ones are kept, oldest first."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._free: list[mmap.mmap] = []
        # The garbage collector may free a tensor at any point, inside these methods too: returned
        # blocks wait in a queue until a thread that holds the lock takes them in.
        self._returned: deque[mmap.mmap] = deque()
        self._lock = threading.Lock()

    def tensor(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return an uninitialised tensor like `like`; its block returns after the last view."""
        size = torch.Size(shape).numel() * like.dtype.itemsize
        block = self._take(-(-size // PAGE) * PAGE)
        own = (ctypes.c_char * size).from_buffer(block, -_address(block) % PAGE)
        # No block needs to return when the process ends.
        weakref.finalize(own, self._give_back, block).atexit = False
        memory = torch.frombuffer(own, dtype=like.dtype).untyped_storage()
        # Not a view of another tensor: autograd forbids in-place changes of those.
        return like.new_empty(0).set_(memory, 0, shape)  # type: ignore[call-overload]

    def kept(self) -> int:
        """Return the number of mapped and unused bytes."""
        return sum(map(len, self._free))

    def release(self) -> None:
        """Hand all unused memory back to the system."""
        with self._lock:
            self._sort_in()
            self._free.clear()

    def _take(self, size: int) -> mmap.mmap:
        with self._lock:
            self._sort_in()
            for index in range(len(self._free) - 1, -1, -1):  # the last freed is in cache
                if len(self._free[index]) == size + PAGE:
                    return self._free.pop(index)
        block = self._map(size + PAGE)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a system without huge pages
                block.madvise(mmap.MADV_HUGEPAGE)
        return block

    def _map(self, size: int) -> mmap.mmap:
        """Map new memory; release the kept blocks and try again before raising."""
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
"""Blocks of this process. A limit of 0 leaves all results to torch's allocator."""


def empty(like: Tensor, *shape: int) -> Tensor:
    """Return an uninitialised tensor of `like`'s dtype, in kept memory if it is large."""
    large = torch.Size(shape).numel() * like.dtype.itemsize >= LARGE
    return BLOCKS.tensor(like, shape) if large and BLOCKS.limit else like.new_empty(shape)
