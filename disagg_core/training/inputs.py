"""What each draft reads of a window: its part of every captured sample, and its own micro-batches.

A sample is fetched once for all drafts of a run and holds what any of them needs. A draft that is trained beside others
is given the same bits as one trained alone, whose samples hold nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from disagg_core.contracts import Capture
from disagg_core.drafts.context import Context
from disagg_core.drafts.layout import varied
from disagg_core.drafts.method import Batch, Batcher, Sample

Packing = Literal["auto"] | bool
"""Whether samples of a micro-batch are packed in one row; ``auto``: where their lengths differ."""


@dataclass(frozen=True)
class Selection:
    """The part `own` of samples that hold what `captured` says."""

    captured: Capture
    own: Capture

    def of(self, sample: Sample) -> Sample:
        """Return `sample` with the states that the draft reads, and no others."""
        if self.own == self.captured:
            return sample
        tensors = dict(sample.tensors)
        if self.own.layers != self.captured.layers:
            places = [self.captured.layers.index(layer) for layer in self.own.layers]
            states = tensors["aux_hidden_states"]
            by_layer = states.view(len(states), len(self.captured.layers), -1)  # [T, captured layers, H]
            tensors["aux_hidden_states"] = by_layer[:, places].flatten(1)  # [T, own layers * H]
        if not self.own.last_hidden_state:
            tensors.pop("last_hidden_state", None)
        return Sample(sample.sample_id, tensors)


@dataclass
class DraftBatches:
    """One draft's micro-batches of a window on one rank; None weighs zero, and every rank has the same number of them.

    `live_positions` counts the positions that are trained on, `normalisers` what the batches add to the numbers that
    the window's loss is divided by: on ranks that share samples, those of all of them.
    """

    batches: list[Batch | None]
    live_positions: int
    normalisers: dict[str, float]
    copied: torch.cuda.Event | None = None
    """When what `copy_to` began is done, on the device."""

    def copy_to(self, device: torch.device, most: int) -> int:
        """Begin to copy batches to `device` on the current stream, up to `most` bytes; return how many those are.

        The batches are in pinned memory. Those beyond `most` stay there.
        """
        size = 0
        for index, batch in enumerate(self.batches):
            if batch is None:
                continue
            size += sum(tensor.nbytes for tensor in batch.moved())
            if size > most:
                break
            self.batches[index] = batch.to(device, non_blocking=True)
        self.copied = torch.cuda.current_stream(device).record_event()
        return size

    def join(self) -> None:
        """Have the device wait for the copies before what the current stream is given from here on."""
        if self.copied is None:
            return
        stream = torch.cuda.current_stream()
        stream.wait_event(self.copied)
        for tensor in (tensor for batch in self.batches if batch is not None for tensor in batch.moved()):
            if tensor.is_cuda:
                tensor.record_stream(stream)  # it belongs to the stream of the copies, which may reuse its memory


@dataclass(frozen=True)
class DraftInput:
    """How one draft reads samples: `batcher` makes batches of its `selection`, packed as `packing` says.

    Rows are padded to a multiple of `multiple_of` tokens. Without a selection it reads all that is captured. With a
    `context` samples are packed always, and batches are this rank's part of them.
    """

    batcher: Batcher
    selection: Selection | None = None
    multiple_of: int = 1
    packing: Packing = "auto"
    context: Context | None = None

    def begin(self) -> DraftBatches:
        """Return a window without micro-batches."""
        return DraftBatches([], 0, dict.fromkeys(self.batcher.normalisers(None), 0.0))

    def add(self, window: DraftBatches, samples: Sequence[Sample], *, pin: bool = False) -> None:
        """Add a micro-batch of `samples` to `window`, `pin` in pinned memory; None with nothing to train on."""
        own = [self.selection.of(sample) for sample in samples] if self.selection is not None else samples
        packed = self.packing is True or (self.packing == "auto" and varied([len(sample) for sample in own]))
        packed, whole = packed or self.context is not None, pin and self.context is None
        batch = self.batcher.collate(own, multiple_of=self.multiple_of, packed=packed, pin=whole) if own else None
        positions = self.batcher.trainable_positions(batch) if batch is not None else 0
        batch = batch if positions else None
        window.live_positions += positions
        for name, value in self.batcher.normalisers(batch).items():
            window.normalisers[name] += value
        if batch is not None and self.context is not None:
            batch = self.batcher.shared(batch, self.context, pin=pin)
        window.batches.append(batch)
