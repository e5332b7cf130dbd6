"""Host memory that is used again: large tensors whose pages are there already, for batches and for copies of samples.

A large tensor of `torch.empty` costs a page fault for each of its pages when it is first written, and the unmapping of
all of them when it is dropped, by whichever thread drops it; for a batch of 64 MiB that is several times the copy into
it. Memory from here comes back when the last tensor over it is gone, and not before: whatever still reads it, a step or
its backward pass, keeps it out of other hands. All memory held is never more than was in use at one time.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import threading
import weakref
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST = 1 << 20
"""Tensors of fewer bytes are left to the allocator, which keeps their memory by itself."""
_HUGE_PAGE = 2 << 20
_SPARE = 1.5
"""A tensor is given memory of at most so many times its own size."""


class HostMemory:
    """Blocks of ordinary host memory for tensors; for any number of threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._returned: deque[mmap.mmap] = deque()
        self._idle: list[mmap.mmap] = []  # the one idle for longest first
        self._in_use = 0
        self._most = 0

    @property
    def total_bytes(self) -> int:
        """Bytes of all blocks, in use and idle."""
        with self._lock:
            self._collect()
            return self._in_use + sum(map(len, self._idle))

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor; its memory is used again when nothing refers to that any more."""
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes < SMALLEST:
            return torch.empty(*shape, dtype=dtype)
        block = self._block(nbytes)
        view = memoryview(block)
        comes_back = weakref.finalize(view, self._returned.append, block)  # at any point of any thread: takes no lock
        comes_back.atexit = False
        return torch.frombuffer(view, dtype=torch.uint8, count=nbytes).view(dtype).view(*shape)

    def _block(self, nbytes: int) -> mmap.mmap:
        with self._lock:
            self._collect()
            fitting = [block for block in self._idle if nbytes <= len(block) <= max(_HUGE_PAGE, _SPARE * nbytes)]
            block = min(fitting, key=len, default=None)
            if block is not None:
                self._idle.remove(block)
            else:
                block = self._new_block(-(-nbytes // _HUGE_PAGE) * _HUGE_PAGE)
            self._in_use += len(block)
            return block

    def _new_block(self, size: int) -> mmap.mmap:
        """Return a block, after giving up as many idle ones as keep the whole within what was once in use."""
        self._most = max(self._most, self._in_use + size)
        while self._in_use + size + sum(map(len, self._idle)) > self._most:
            self._idle.pop(0)
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # no transparent huge pages on this machine
            block.madvise(mmap.MADV_HUGEPAGE)
        return block

    def _collect(self) -> None:
        while self._returned:
            block = self._returned.popleft()
            self._in_use -= len(block)
            self._idle.append(block)


host_memory = HostMemory()
"""This process's."""
