"""Copies between staging memory and GPUs, each on a stream of its own so that they run beside the model's kernels."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch
from torch import Tensor

from disagg_core.contracts import FeatureSpec
from disagg_core.host_memory import host_memory
from disagg_core.store.packing import Layout, pack_into, unpack
from disagg_core.store.staging import StagingPool


class DeviceCopies:
    """The copy streams of one store client, one for each GPU and direction."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._streams: dict[tuple[torch.device, str], torch.cuda.Stream] = {}

    def pack(
        self,
        pool: StagingPool,
        buffer: Tensor,
        tensors: Mapping[str, Tensor],
        layout: Layout,
        ready: torch.cuda.Event | None,
    ) -> None:
        """Pack `tensors` into `buffer`, a part of `pool`, once `ready` (the work that writes them) has happened."""
        if ready is None:
            pack_into(buffer, tensors, layout)
            return
        gpu = _gpu_of(tensors)
        pool.pin(gpu)
        stream = self._stream(gpu, "out")
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            pack_into(buffer, tensors, layout, non_blocking=True)
        stream.synchronize()

    def hand_out(
        self, pool: StagingPool, buffer: Tensor, specs: Mapping[str, FeatureSpec], device: torch.device
    ) -> dict[str, Tensor]:
        """Return the tensors in `buffer`, a part of `pool`, as copies on `device`; the buffer is free on return."""
        if device.type != "cuda":
            return unpack(host_memory.empty(buffer.shape, buffer.dtype).copy_(buffer), specs)
        pool.pin(device)
        stream = self._stream(device, "in")
        with torch.cuda.stream(stream):
            copy = buffer.to(device, non_blocking=True)
        stream.synchronize()
        copy.record_stream(torch.cuda.default_stream(device))
        return unpack(copy, specs)

    def _stream(self, device: torch.device, direction: str) -> torch.cuda.Stream:
        with self._lock:
            key = (device, direction)
            if key not in self._streams:
                self._streams[key] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            return self._streams[key]


def named(device: str | torch.device) -> torch.device:
    """Return `device` with its number: ``cuda`` means the caller's GPU, and another thread has another one."""
    found = torch.device(device)
    if found.type == "cuda" and found.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return found


def written_so_far(tensors: Mapping[str, Tensor]) -> torch.cuda.Event | None:
    """Return an event that happens when the work queued so far on the tensors' GPU is done; None without a GPU."""
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if not in_use or not any(tensor.is_cuda for tensor in tensors.values()):
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(_gpu_of(tensors)))
    return event


def _gpu_of(tensors: Mapping[str, Tensor]) -> torch.device:
    return next(tensor.device for tensor in tensors.values() if tensor.is_cuda)
