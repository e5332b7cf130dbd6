"""Where samples lie packed before they are put: where their producer wrote them, or in a copy.

A producer that asks `Outgoing.allocate` for its tensors writes them straight into transfer memory, already in the
layout of the object to be; such a sample is put without another copy. Any other sample is packed first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, Protocol, TypeAlias, TypeGuard

import torch
from torch import Tensor

from disagg_core.store.devices import DeviceCopies
from disagg_core.store.packing import Layout, in_a_row, plan_layout, unpack, zero_gaps
from disagg_core.store.staging import Slot, StagingPool

Shapes: TypeAlias = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of each tensor of a sample, in the order in which they will be put."""
CPU = torch.device("cpu")


class Allocate(Protocol):
    """Makes the tensors of a sample, uninitialised; `MooncakeFeatureStore.allocate` or `allocate_plain`."""

    def __call__(self, shapes: Shapes, filled_from: torch.device = CPU) -> Mapping[str, Tensor]:
        """Return CPU tensors of `shapes`, which will be filled with what lies on the device `filled_from`."""
        ...


def allocate_plain(shapes: Shapes, filled_from: torch.device = CPU) -> dict[str, Tensor]:
    """Return uninitialised tensors in ordinary memory."""
    return {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}


class Packed(NamedTuple):
    """A sample in transfer memory, ready to be sent."""

    slot: Slot
    layout: Layout


class PackedTensors(Mapping[str, Tensor]):
    """The tensors of one sample in the transfer memory of one client.

    Their values may change, the mapping may not: it holds what lies at `packed`.
    """

    def __init__(self, packed: Packed) -> None:
        buffer = packed.slot.lend()
        zero_gaps(buffer, packed.layout)
        self.packed = packed
        self._tensors = unpack(buffer, packed.layout.specs)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def layout_of(tensors: Mapping[str, Tensor]) -> Layout:
    """Return the layout in which `tensors` lie or will lie."""
    return tensors.packed.layout if isinstance(tensors, PackedTensors) else plan_layout(tensors)


class Outgoing:
    """The outgoing transfer memory of one client: a pool for copies, and one for what producers allocate.

    Args:
        new_pool: makes a pool of transfer memory with the name given.
    """

    def __init__(self, new_pool: Callable[[str], StagingPool]) -> None:
        self._copied = new_pool("outgoing")
        self._allocated = new_pool("allocated")
        self._copies = DeviceCopies()

    def allocate(self, shapes: Shapes, filled_from: torch.device = CPU) -> Mapping[str, Tensor]:
        """Return tensors that lie as a packed sample, in transfer memory if there is room at this moment.

        The memory comes back when the last of them is gone; it is page-locked if `filled_from` is a GPU.
        """
        layout = plan_layout({name: torch.empty(s, dtype=dtype, device="meta") for name, (s, dtype) in shapes.items()})
        slot = self._allocated.acquire_now(layout.size_bytes)
        if slot is None:
            return allocate_plain(shapes)
        if filled_from.type == "cuda":
            self._allocated.pin(filled_from)
        return PackedTensors(Packed(slot, layout))

    def packed(
        self, samples: Sequence[Mapping[str, Tensor]], ready: Sequence[torch.cuda.Event | None], timeout_s: float
    ) -> AbstractContextManager[list[Packed]]:
        """Hold the samples in transfer memory for as long as the context lasts; copies those that lie elsewhere.

        Args:
            samples: the tensors of each sample.
            ready: the work on the GPU that writes each sample, as `written_so_far` says.
            timeout_s: how long to wait for memory for copies.

        Raises:
            StoreUnavailable: none came free.
            BadInput: a tensor cannot be stored.
        """
        in_place = [sample.packed for sample in samples if self._holds(sample)]
        return nullcontext(in_place) if len(in_place) == len(samples) else self._copy(samples, ready, timeout_s)

    def _holds(self, sample: Mapping[str, Tensor]) -> TypeGuard[PackedTensors]:
        return isinstance(sample, PackedTensors) and sample.packed.slot.pool is self._allocated

    @contextmanager
    def _copy(
        self, samples: Sequence[Mapping[str, Tensor]], ready: Sequence[torch.cuda.Event | None], timeout_s: float
    ) -> Iterator[list[Packed]]:
        layouts = [layout_of(sample) for sample in samples]
        sizes = [
            0 if self._holds(sample) else layout.size_bytes for sample, layout in zip(samples, layouts, strict=True)
        ]
        offsets, total = in_a_row(sizes)
        with self._copied.acquire(total, timeout_s) as room:
            packed = []
            for sample, layout, offset, event in zip(samples, layouts, offsets, ready, strict=True):
                if self._holds(sample):
                    packed.append(sample.packed)
                    continue
                part = room.part(offset, layout.size_bytes)
                self._copies.pack(self._copied, part.buffer, sample, layout, event)
                packed.append(Packed(part, layout))
            yield packed
