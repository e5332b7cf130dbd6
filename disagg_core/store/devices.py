"""Copies between staging memory and GPUs, each on a stream of its own so that they run beside the model's kernels."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch
from torch import Tensor

from disagg_core.store.packing import Layout, pack_into


class DeviceCopies:
    """The copy streams of one store client, one for each GPU and direction."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._streams: dict[tuple[torch.device, str], torch.cuda.Stream] = {}

    def to_device(self, tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Return copies of staged `tensors` on `device`; the staging memory is free again on return."""
        stream = self._stream(device, "in")
        with torch.cuda.stream(stream):
            copies = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        stream.synchronize()
        for copy in copies.values():
            copy.record_stream(torch.cuda.default_stream(device))
        return copies

    def pack(self, buffer: Tensor, tensors: Mapping[str, Tensor], layout: Layout, ready: torch.cuda.Event) -> None:
        """Pack `tensors` of a GPU into staging memory once `ready` has happened."""
        device = next(tensor.device for tensor in tensors.values() if tensor.is_cuda)
        stream = self._stream(device, "out")
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            pack_into(buffer, tensors, layout, non_blocking=True)
        stream.synchronize()

    def _stream(self, device: torch.device, direction: str) -> torch.cuda.Stream:
        with self._lock:
            key = (device, direction)
            if key not in self._streams:
                self._streams[key] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            return self._streams[key]


def on_gpu(tensors: Mapping[str, Tensor]) -> bool:
    """Tell whether any of `tensors` lies on a GPU."""
    return any(tensor.is_cuda for tensor in tensors.values())


def written_so_far(tensors: Mapping[str, Tensor]) -> torch.cuda.Event | None:
    """Return an event that happens when the work queued so far on the tensors' GPU is done; None without a GPU."""
    if not on_gpu(tensors):
        return None
    device = next(tensor.device for tensor in tensors.values() if tensor.is_cuda)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event
