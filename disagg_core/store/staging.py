"""Transfer memory: registered with Mooncake once, populated as far as it is used, handed out in slots.

Fresh memory for each transfer costs a page fault for every page, and a registration, which is slower than the transfer
itself. So a pool keeps one region and lends slots of it. A slot comes back by `Slot.release`, or, when `Slot.lend` gave
its memory to a caller as tensors, when the last of these tensors is gone: nobody can hold a tensor over memory that is
in use again. After a failed read the memory may still be written to by the transfer that was given up, so such a slot
is set aside before it is used for anything else; after a failed put it may still be read, so it stays mapped as long.

A pool takes no more memory than its region. A sample that is larger waits until the region is free and gets a larger
one in its place; only while memory is set aside are there several. A region that nobody uses for a while is given up.
"""

from __future__ import annotations

import bisect
import logging
import mmap
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from disagg_core.errors import StoreRejected, StoreUnavailable
from disagg_core.processes.retry import wait_until
from disagg_core.store.capacity import most_regions
from disagg_core.store.pages import populate, prefer_huge_pages

log = logging.getLogger(__name__)

PAGE = 4096
HUGE_PAGE = 2 << 20
RETIRED_FOR_S = 60.0
IDLE_S = 60.0
"""A region that was not used for so long is given up."""
POLL_S = 0.001


@dataclass(eq=False)
class Region:
    """One registered mapping and its free spans, as sorted ``[offset, end]`` pairs that do not touch."""

    memory: mmap.mmap
    buffer: Tensor
    free: list[tuple[int, int]] = field(default_factory=list)
    used_at: float = field(default_factory=time.monotonic)
    mapped_until: float = 0.0
    populated: int = 0

    @property
    def address(self) -> int:
        """Where the mapping begins."""
        return self.buffer.data_ptr()

    def is_free(self) -> bool:
        """Whether no part of it is held."""
        return self.free == [(0, len(self.memory))]

    def may_go(self, idle_s: float = 0.0) -> bool:
        """Whether nothing reads or writes it any more, and nobody has used it for `idle_s` seconds."""
        now = time.monotonic()
        return self.is_free() and now >= self.mapped_until and now - self.used_at >= idle_s

    def take(self, nbytes: int) -> int | None:
        """Cut the first free span of `nbytes`; return its offset, or None when there is none."""
        for index, (offset, end) in enumerate(self.free):
            if end - offset >= nbytes:
                self.used_at = time.monotonic()
                self.free[index : index + 1] = [(offset + nbytes, end)] if end - offset > nbytes else []
                self._populate(offset + nbytes)
                return offset
        return None

    def _populate(self, end: int) -> None:
        """Give the pages before `end` their memory, if they have none yet: the first spans are used most."""
        if end > self.populated:
            if populate(self.address + self.populated, end - self.populated):
                self.buffer[self.populated : end].zero_()
            self.populated = end

    def give_back(self, offset: int, nbytes: int) -> None:
        """Make a span free again and join it with its neighbours."""
        self.used_at = time.monotonic()
        end = offset + nbytes
        index = bisect.bisect(self.free, (offset, end))
        if index < len(self.free) and self.free[index][0] == end:
            end = self.free.pop(index)[1]
        if index > 0 and self.free[index - 1][1] == offset:
            offset = self.free.pop(index - 1)[0]
            index -= 1
        self.free.insert(index, (offset, end))


class Slot:
    """A span of a region, held by one transfer. `size` is what was asked for; `address` is for Mooncake.

    It is `tainted` when a transfer into it was given up: that may still write the bytes of its object into it.
    """

    def __init__(self, pool: StagingPool, region: Region, offset: int, size: int, *, held: bool = True) -> None:
        self.pool = pool
        self._region = region
        self._offset = offset
        self._held = held
        self.size = size
        self.tainted = False
        self.address = region.address + offset

    @property
    def buffer(self) -> Tensor:
        """The slot's bytes as a tensor, while the slot is held."""
        return self._region.buffer[self._offset : self._offset + self.size]

    @property
    def memory(self) -> memoryview:
        """The slot's bytes."""
        return memoryview(self._region.memory)[self._offset : self._offset + self.size]

    def release(self) -> None:
        """Give the slot back; a second call does nothing. A tainted one is set aside for a while first."""
        if self._held:
            self._held = False
            give_back = self.pool.set_aside if self.tainted else self.pool.returned
            give_back(self._region, self._offset, self.size)

    def keep_mapped(self) -> None:
        """Keep the memory where it is for a while: a transfer out of it that was given up may still read it."""
        self._region.mapped_until = time.monotonic() + RETIRED_FOR_S

    def part(self, offset: int, size: int) -> Slot:
        """Return a slot over a part of this one; it is never given back by itself."""
        return Slot(self.pool, self._region, self._offset + offset, size, held=False)

    def lend(self) -> Tensor:
        """Return the slot's bytes as a tensor that gives the slot back when its storage is freed."""
        view = self.memory
        comes_back = weakref.finalize(view, self.pool.returned, self._region, self._offset, self.size)
        comes_back.atexit = False
        self._held = False
        return torch.frombuffer(view, dtype=torch.uint8)

    def __enter__(self) -> Slot:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class StagingPool:
    """Slots of transfer memory for one direction of transfer.

    Args:
        region_bytes: size of the region, which is made when it is first needed; see `capacity.staging_bytes_for`.
        register: registers an address and a size with Mooncake; returns its code.
        name: what the memory is for, in messages.
        unregister: undoes the registration of an address; returns Mooncake's code.
    """

    def __init__(
        self,
        region_bytes: int,
        register: Callable[[int, int], int],
        name: str,
        unregister: Callable[[int], int] = lambda address: 0,
    ) -> None:
        self._name = name
        self._register = register
        self._unregister = unregister
        self._region_bytes = region_bytes
        self._regions: list[Region] = []
        self._gpu: torch.device | None = None
        self._turn = threading.Lock()  # one thread at a time looks for room, so a large request is not overtaken
        self._lock = threading.Lock()
        self._returned: deque[tuple[Region, int, int]] = deque()
        self._set_aside: deque[tuple[float, Region, int, int]] = deque()

    @property
    def total_bytes(self) -> int:
        """Bytes of all regions."""
        return sum(len(region.memory) for region in self._regions)

    @property
    def is_pinned(self) -> bool:
        """Whether CUDA copies to and from this memory asynchronously."""
        return self._gpu is not None

    def acquire(self, nbytes: int, timeout_s: float) -> Slot:
        """Return a slot of `nbytes`, waiting for others to come back.

        Raises:
            StoreUnavailable: none came free for `timeout_s` seconds.
        """
        deadline = time.monotonic() + timeout_s
        if self._turn.acquire(timeout=timeout_s):
            try:
                slot = self._take(nbytes)  # nearly always there is room: spare every put and get what a wait costs
                if slot is None:
                    left_s = deadline - time.monotonic()
                    slot = wait_until(lambda: self._take(nbytes), timeout_s=left_s, every_s=POLL_S)
                if slot is not None:
                    return slot
            finally:
                self._turn.release()
        raise StoreUnavailable(
            f"no {nbytes} bytes of the {self.total_bytes} bytes of {self._name} staging memory came free in "
            f"{timeout_s:g} s; transfers hang, or staging_bytes is too small for the threads that use it"
        )

    def acquire_now(self, nbytes: int) -> Slot | None:
        """Return a slot of `nbytes` if the region has one free at this moment; it is not made larger for that."""
        return self._take(nbytes) if nbytes <= self._region_bytes else None

    def pin(self, gpu: torch.device) -> None:
        """Page-lock the memory for CUDA, now and for regions to come; `gpu` is the device in whose context."""
        with self._lock:
            if self._gpu is None:
                self._gpu = gpu
                for region in self._regions:
                    _pin(region, gpu)

    def returned(self, region: Region, offset: int, size: int) -> None:
        """Take back a span. Called from finalizers too, at any point of any thread, so it takes no lock."""
        self._returned.append((region, offset, size))

    def set_aside(self, region: Region, offset: int, size: int) -> None:
        """Take back a span that a lost transfer may still write to."""
        self._set_aside.append((time.monotonic() + RETIRED_FOR_S, region, offset, size))

    def give_up_idle(self, idle_s: float) -> None:
        """Give up the regions that nobody has used for `idle_s` seconds.

        Raises:
            StoreRejected: Mooncake or CUDA refuses to let go of one.
        """
        with self._lock:
            self._collect()
            for region in [region for region in self._regions if region.may_go(idle_s)]:
                self._give_up(region)

    def close(self) -> None:
        """Undo the page-locking; the memory itself goes with the last tensor over it."""
        with self._lock:
            if self._gpu is not None:
                for region in self._regions:
                    _unpin(region, self._gpu)
                self._gpu = None

    def _take(self, nbytes: int) -> Slot | None:
        wanted = _pages(nbytes)
        with self._lock:
            self._collect()
            for region in self._regions:
                found = region.take(wanted)
                if found is not None:
                    return Slot(self, region, found, nbytes)
            if wanted > self._region_bytes:  # by a quarter at least: samples that grow bit by bit move it rarely
                self._region_bytes = max(wanted, self._region_bytes * 5 // 4)
            if not self._makes_way(wanted):
                return None
            region = self._new_region(self._region_bytes)
            found = region.take(wanted)
        assert found is not None
        return Slot(self, region, found, nbytes)

    def _makes_way(self, wanted: int) -> bool:
        """Give up free regions that are too small for `wanted`; tell whether there may be a new one."""
        for region in [region for region in self._regions if len(region.memory) < wanted and region.may_go()]:
            self._give_up(region)
        rests = self._set_aside or any(region.is_free() for region in self._regions)
        return not self._regions or (bool(rests) and len(self._regions) < most_regions(self._region_bytes))

    def _collect(self) -> None:
        while self._set_aside and self._set_aside[0][0] <= time.monotonic():
            self.returned(*self._set_aside.popleft()[1:])
        while self._returned:
            region, offset, size = self._returned.popleft()
            region.give_back(offset, _pages(size))

    def _new_region(self, nbytes: int) -> Region:
        size = -(-nbytes // HUGE_PAGE) * HUGE_PAGE
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        region = Region(memory, torch.frombuffer(memory, dtype=torch.uint8), [(0, size)])
        prefer_huge_pages(region.address, size)
        code = self._register(region.address, size)
        if code:
            raise StoreRejected(f"Mooncake refused to register {size} bytes of staging memory with code {code}")
        if self._gpu is not None:
            _pin(region, self._gpu)
        self._regions.append(region)
        log.debug("%s staging memory: %d bytes in %d regions", self._name, self.total_bytes, len(self._regions))
        return region

    def _give_up(self, region: Region) -> None:
        """Let go of a free region; its memory goes back to the machine with the last reference to it."""
        code = self._unregister(region.address)
        if code:
            raise StoreRejected(
                f"Mooncake refused to unregister {len(region.memory)} bytes of staging memory with code {code}"
            )
        self._regions.remove(region)
        if self._gpu is not None:
            _unpin(region, self._gpu)
        log.debug("%s staging memory: %d bytes in %d regions", self._name, self.total_bytes, len(self._regions))


def _pages(nbytes: int) -> int:
    return max(1, -(-nbytes // PAGE)) * PAGE


def _pin(region: Region, gpu: torch.device) -> None:
    with torch.cuda.device(gpu):  # a thread that names none makes a context on GPU 0
        _cuda_check(_cudart().cudaHostRegister(region.address, len(region.memory), 0), "cudaHostRegister")


def _unpin(region: Region, gpu: torch.device) -> None:
    with torch.cuda.device(gpu):
        _cuda_check(_cudart().cudaHostUnregister(region.address), "cudaHostUnregister")


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _cuda_check(code: object, call: str) -> None:
    if int(code) != 0:  # type: ignore[call-overload]
        raise StoreRejected(f"{call} of staging memory failed with CUDA error {int(code)}")  # type: ignore[call-overload]
