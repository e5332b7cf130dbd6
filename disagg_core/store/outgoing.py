"""Where samples lie packed before they are put: where their producer wrote them, or in a copy.

A producer that asks `Outgoing.allocate` for its tensors writes them straight into transfer memory, already in the
layout of the object to be; such a sample is put without another copy. Any other sample is packed first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TypeAlias

import torch
from torch import Tensor

from disagg_core.store.devices import DeviceCopies
from disagg_core.store.packing import Layout, in_a_row, packed_at, plan_layout, unpack, zero_gaps
from disagg_core.store.staging import Slot, StagingPool

Shapes: TypeAlias = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of each tensor of a sample, in the order in which they will be put."""
Allocate: TypeAlias = Callable[[Shapes], dict[str, Tensor]]
"""Makes the tensors of a sample, uninitialised; `MooncakeFeatureStore.allocate` or `allocate_plain`."""


def allocate_plain(shapes: Shapes) -> dict[str, Tensor]:
    """Return uninitialised tensors in ordinary memory."""
    return {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}


class Outgoing:
    """The outgoing transfer memory of one client: `staging_bytes` for copies, as much for what producers allocate."""

    def __init__(self, staging_bytes: int, register: Callable[[int, int], int], copies: DeviceCopies) -> None:
        self._copied = StagingPool(staging_bytes, register, "outgoing")
        self._allocated = StagingPool(staging_bytes, register, "allocated")
        self._copies = copies

    def allocate(self, shapes: Shapes) -> dict[str, Tensor]:
        """Return tensors that lie as a packed sample, in transfer memory if there is room at this moment.

        The memory comes back when the last of them is gone.
        """
        layout = plan_layout({name: torch.empty(s, dtype=dtype, device="meta") for name, (s, dtype) in shapes.items()})
        slot = self._allocated.acquire_now(layout.size_bytes)
        if slot is None:
            return allocate_plain(shapes)
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            self._allocated.pin()
        buffer = slot.lend()
        zero_gaps(buffer, layout)
        return unpack(buffer, layout.specs)

    @contextmanager
    def packed(
        self,
        samples: Sequence[Mapping[str, Tensor]],
        layouts: Sequence[Layout],
        ready: Sequence[torch.cuda.Event | None],
        timeout_s: float,
    ) -> Iterator[list[Slot]]:
        """Yield the transfer memory of each sample, packed as its layout says, for as long as the context lasts.

        Args:
            ready: the work on the GPU that writes each sample, as `written_so_far` says.
            timeout_s: how long to wait for memory for copies.

        Raises:
            StoreUnavailable: none came free.
        """
        slots = [self._in_place(tensors, layout) for tensors, layout in zip(samples, layouts, strict=True)]
        sizes = [0 if slot else layout.size_bytes for slot, layout in zip(slots, layouts, strict=True)]
        offsets, total = in_a_row(sizes)
        with self._copied.acquire(total, timeout_s) if total else nullcontext() as room:
            for index, slot in enumerate(slots):
                if room is not None and slot is None:
                    slots[index] = part = room.part(offsets[index], sizes[index])
                    self._copies.pack(self._copied, part.buffer, samples[index], layouts[index], ready[index])
            yield [slot for slot in slots if slot is not None]

    def close(self) -> None:
        """Undo the page-locking of the memory."""
        for pool in (self._copied, self._allocated):
            pool.close()

    def _in_place(self, tensors: Mapping[str, Tensor], layout: Layout) -> Slot | None:
        address = packed_at(tensors, layout)
        return None if address is None else self._allocated.slot_at(address, layout.size_bytes)
