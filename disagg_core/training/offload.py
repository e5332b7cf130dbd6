"""Optimizer state that lives in host memory and visits the device for the update, some parameters at a time.

The update itself is the device's, with the same kernels and bits as without. The parameters are cut into chunks; the
state of a chunk is copied from page-locked memory into one of two buffers on the device, updated there, and copied
back. Copies have streams of their own, one for each direction: while a chunk is updated the next one arrives and the
one before leaves, and nothing of it makes the host wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from disagg_core.training.optimizer import OwnOptimizer, blank_state, update_unless
from disagg_core.training.rows import own_rows, placed_as

CHUNK_BYTES = 256 * 1024**2
"""Bytes of state in a chunk, about; the state of one parameter is never cut."""


@dataclass
class _Buffer:
    """Memory on the device for the state of one chunk after the other; `free` tells when the last one has left it."""

    memory: Tensor
    free: torch.cuda.Event | None = None


@dataclass
class _Chunk:
    """Parameters that are updated together.

    `starts` tells where in a buffer each tensor of a parameter's state begins; `host` has this rank's rows of them, of
    which each is a tensor of its own, as the staging of checkpoints wants it.
    """

    parameters: list[nn.Parameter]
    starts: dict[nn.Parameter, dict[str, int]]
    size: int = 0
    host: dict[nn.Parameter, dict[str, Tensor]] = field(default_factory=dict)
    left: torch.cuda.Event | None = None
    """When the state is back in host memory."""


class Offloaded(OwnOptimizer):
    """Another optimizer, of one group of parameters on `device`, with its state in host memory.

    Counters of steps stay on the device. On a CPU the state is copied all the same, from memory to memory.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, device: torch.device, *, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        (group,) = optimizer.param_groups
        super().__init__(list(group["params"]), {})
        self.param_groups = optimizer.param_groups
        self._optimizer = optimizer
        self._device = device
        self._chunks = _cut(optimizer, group["params"], chunk_bytes)
        self._chunk_of = {parameter: chunk for chunk in self._chunks for parameter in chunk.parameters}
        self._buffers: list[_Buffer] = []
        self._host_mesh = _host_mesh(group["params"])
        on_gpu = device.type == "cuda"
        self._arriving = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._leaving = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]

    def blank_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return a state of zeros, in host memory but for the counter of steps."""
        chunk, shape = self._chunk_of[parameter], own_rows(parameter).shape
        pinned = self._device.type == "cuda"
        host = {kind: torch.zeros(shape, pin_memory=pinned) for kind in chunk.starts[parameter]}
        chunk.host[parameter] = host
        wide = {kind: placed_as(parameter, rows, self._host_mesh) for kind, rows in host.items()}
        return {kind: wide.get(kind, blank) for kind, blank in blank_state(self._optimizer, parameter).items()}

    def settle(self) -> None:
        """Wait until the state is back in host memory."""
        if self._leaving is not None:
            self._leaving.synchronize()

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update all parameters, chunk by chunk."""
        assert closure is None
        (group,) = self.param_groups
        whole = group["params"]
        buffers = self._device_buffers()
        for number, chunk in enumerate(self._chunks):
            for parameter in chunk.parameters:
                if not self.state[parameter]:
                    self.state[parameter] = self.blank_state(parameter)
            buffer = buffers[number % len(buffers)]
            self._bring(chunk, buffer)
            group["params"] = chunk.parameters
            self._optimizer.state.update({p: self._visiting(chunk, p, buffer) for p in chunk.parameters})
            if self.found_inf is None:
                self._optimizer.step()
            else:
                update_unless(self.found_inf, self._optimizer)
            self._take_back(chunk, buffer)
            self._optimizer.state.clear()
        group["params"] = whole

    def _visiting(self, chunk: _Chunk, parameter: nn.Parameter, buffer: _Buffer) -> dict[str, Tensor]:
        """Return the parameter's state with what of it is in the `buffer`."""
        starts = chunk.starts[parameter]
        there = {kind: placed_as(parameter, _rows_in(buffer, start, parameter)) for kind, start in starts.items()}
        return {kind: there.get(kind, tensor) for kind, tensor in self.state[parameter].items()}

    def _device_buffers(self) -> Sequence[_Buffer]:
        """Return two buffers, or one where there is one chunk only; they are made once."""
        if not self._buffers:
            longest = max(chunk.size for chunk in self._chunks)
            count = min(2, len(self._chunks))
            self._buffers = [_Buffer(torch.empty(longest, device=self._device)) for _ in range(count)]
            if self._arriving is not None:  # the memory may still be read by what was given to the device before
                self._arriving.wait_stream(torch.cuda.current_stream(self._device))
        return self._buffers

    def _bring(self, chunk: _Chunk, buffer: _Buffer) -> None:
        """Copy the chunk's state into the `buffer`, which what the current stream is given from here on finds there."""
        if self._arriving is None:
            for host, there in _pairs(chunk, buffer):
                there.copy_(host)
            return
        for event in (buffer.free, chunk.left):
            if event is not None:
                self._arriving.wait_event(event)
        with torch.cuda.stream(self._arriving):
            for host, there in _pairs(chunk, buffer):
                there.copy_(host, non_blocking=True)
        torch.cuda.current_stream(self._device).wait_stream(self._arriving)

    def _take_back(self, chunk: _Chunk, buffer: _Buffer) -> None:
        """Copy the chunk's state back from the `buffer`, after what the current stream was given."""
        if self._leaving is None:
            for host, there in _pairs(chunk, buffer):
                host.copy_(there)
            return
        self._leaving.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._leaving):
            for host, there in _pairs(chunk, buffer):
                host.copy_(there, non_blocking=True)
        chunk.left = buffer.free = self._leaving.record_event()


def _cut(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], chunk_bytes: int) -> list[_Chunk]:
    chunks: list[_Chunk] = []
    for parameter in parameters:
        kinds = [kind for kind, tensor in blank_state(optimizer, parameter).items() if tensor.shape == parameter.shape]
        size = own_rows(parameter).numel()
        if not chunks or 4 * (chunks[-1].size + size * len(kinds)) > chunk_bytes:
            chunks.append(_Chunk([], {}))
        chunk = chunks[-1]
        chunk.parameters.append(parameter)
        chunk.starts[parameter] = {kind: chunk.size + place * size for place, kind in enumerate(kinds)}
        chunk.size += size * len(kinds)
    return chunks


def _host_mesh(parameters: Sequence[Tensor]) -> DeviceMesh | None:
    """Return the mesh of the parameters' ranks with tensors in host memory; None where nothing is sharded."""
    first = parameters[0]
    if not isinstance(first, DTensor):
        return None
    mesh = first.device_mesh
    return mesh if mesh.device_type == "cpu" else init_device_mesh("cpu", tuple(mesh.shape))


def _rows_in(buffer: _Buffer, start: int, parameter: nn.Parameter) -> Tensor:
    """Return the part of the `buffer` from `start` on, shaped as this rank's rows of `parameter`."""
    rows = own_rows(parameter.detach())
    return buffer.memory[start : start + rows.numel()].view(rows.shape)


def _pairs(chunk: _Chunk, buffer: _Buffer) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the tensors of the chunk's state, each in host memory and its place in the `buffer`."""
    for parameter, starts in chunk.starts.items():
        for kind, start in starts.items():
            yield chunk.host[parameter][kind], _rows_in(buffer, start, parameter)
