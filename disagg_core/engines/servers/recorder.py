"""The capture side inside an SGLang server: collects a prompt's states, writes samples, holds replies until written.

Lives in the scheduler process of tensor-parallel rank 0. The scheduler's thread hands rows over (`Recorder.collect`)
and goes on with the next batch; one writer thread copies them off the device and puts them into the store. A reply is
held back until its own sample is settled (`Recorder.hold`, `Recorder.released`), so a reply means: written, or not
there at all. Nothing here raises into the scheduler, whose event loop an exception would kill: what goes wrong becomes
a `RefusedReply`. Knows SGLang's objects by the few attributes of `CapturableRequest` only and imports nothing of it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from disagg_core.contracts import RunIdentity, SampleRef
from disagg_core.engines.contract import is_finite, shapes_of
from disagg_core.engines.servers.wire import (
    WIRE_KEY,
    CaptureOrder,
    ProbeOrder,
    ProbeReply,
    RefusedReply,
    Reply,
    ServerFacts,
    StoreAddress,
    StoredReply,
    encode_reply,
    mask_of,
)
from disagg_core.errors import StoreError
from disagg_core.store.outgoing import Shapes
from disagg_core.store.packing import pack_into, plan_layout

logger = logging.getLogger(__name__)

MAX_PENDING_BYTES = 2 * 1024**3
"""States waiting for the writer, at most; beyond that a sample is refused and the producer tries again later."""

_OPEN_STORES = 2
_BATCH = 16


class CapturableRequest(Protocol):
    """What is read of, and set on, SGLang's `Req`."""

    rid: str
    origin_input_ids: Any
    customized_info: dict[str, list[Any]] | None


class WritableStore(Protocol):
    """What the writer does with a feature store, as `MooncakeFeatureStore` does it."""

    def allocate(self, shapes: Shapes, filled_from: torch.device) -> Mapping[str, Tensor]:
        """Return memory for the tensors of one sample, which lie on `filled_from` before they are copied into it."""
        ...

    def put(
        self,
        sample_id: str,
        tensors: Mapping[str, Tensor],
        *,
        identity: RunIdentity,
        source_task_id: str,
        num_tokens: int,
        metadata: Mapping[str, str | int | float | bool | None] | None = None,
    ) -> SampleRef:
        """Store one sample and return its reference."""
        ...

    def abort(self, ref: SampleRef) -> None:
        """Remove a sample that nobody will read."""
        ...

    def close(self) -> None:
        """Disconnect."""
        ...


@dataclass(eq=False)
class Recording:
    """One request's capture, from its first chunk to its reply."""

    order: CaptureOrder | ProbeOrder | None = None  # None: unreadable, and refused for it
    aux: list[Tensor] = field(default_factory=list)  # each [rows, layers * hidden]
    last: list[Tensor] = field(default_factory=list)  # each [rows, hidden]; empty where the sample has none
    input_ids: list[int] = field(default_factory=list)
    handed_over: bool = False
    abandoned: bool = False
    reply: Reply | None = None

    @property
    def wants_last(self) -> bool:
        """Whether the last hidden state is kept: a probe looks at all that the server captures."""
        return not isinstance(self.order, CaptureOrder) or self.order.identity.capture.last_hidden_state

    @property
    def nbytes(self) -> int:
        """Bytes of the collected states."""
        return sum(part.nbytes for part in (*self.aux, *self.last))


class Recorder:
    """Collects, writes, and tells when a reply may go out. `collect`, `hold` and `released` belong to one thread."""

    def __init__(
        self,
        open_store: Callable[[StoreAddress], WritableStore],
        *,
        max_pending_bytes: int = MAX_PENDING_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_pending_bytes = max_pending_bytes
        self._pending_bytes = 0
        self._queue: deque[Recording] = deque()
        self._changed = threading.Condition()
        self._held: list[tuple[Recording, Any, Any]] = []
        self._clock = clock
        self._writer = _RecordingWriter(open_store, clock)
        self._thread: threading.Thread | None = None

    @property
    def holding(self) -> int:
        """Replies held back at present."""
        return len(self._held)

    def collect(self, recording: Recording, *, aux: Tensor, last: Tensor) -> None:
        """Add the rows of one chunk: `aux` [rows, layers * hidden] and `last` [rows, hidden], on any device."""
        recording.aux.append(aux)
        if recording.wants_last:
            recording.last.append(last)

    def restart(self, recording: Recording) -> None:
        """Forget the chunks of a request that SGLang took back and will run again from its first token."""
        if not recording.handed_over:
            recording.aux.clear()
            recording.last.clear()

    def refuse(self, recording: Recording, reason: str, *, retryable: bool, busy: bool = False) -> None:
        """Settle `recording` without a sample; `busy`: it was not to be had at present."""
        recording.aux.clear()
        recording.last.clear()
        recording.handed_over = True
        recording.reply = RefusedReply(reason=reason, retryable=retryable, busy=busy)
        logger.warning("capture refused: %s", reason)

    def finish(self, recording: Recording, input_ids: list[int], facts: Callable[[], ServerFacts]) -> None:
        """Check the collected rows against the prompt's `input_ids` and hand the sample to the writer.

        A prefix-cache hit or a truncated prompt shows as a number of rows that is not the number of tokens: such a
        sample is refused, never stored.
        """
        order = recording.order
        assert order is not None
        rows = sum(len(part) for part in recording.aux)
        ordered = order.num_tokens if isinstance(order, CaptureOrder) else len(input_ids)
        if rows != len(input_ids) or ordered != len(input_ids):
            reason = f"expected {ordered} rows of states for {len(input_ids)} prompt tokens, found {rows}"
            self.refuse(recording, f"{reason}; is --disable-radix-cache set?", retryable=False)
            return
        recording.input_ids = input_ids
        recording.handed_over = True
        if isinstance(order, ProbeOrder):
            recording.reply = _probe_reply(recording, facts(), self._clock())
            return
        if (mismatch := _mismatch(order, recording.aux[0], facts())) is not None:
            self.refuse(recording, mismatch, retryable=False)
            return
        self._hand_over(recording)

    def _hand_over(self, recording: Recording) -> None:
        with self._changed:
            if self._pending_bytes and self._pending_bytes + recording.nbytes > self._max_pending_bytes:
                full = f"the server's writer is behind: {self._pending_bytes} bytes of states wait for the store"
                self.refuse(recording, full, retryable=True, busy=True)
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._write, name="draftline-writer", daemon=True)
                self._thread.start()
            self._pending_bytes += recording.nbytes
            self._queue.append(recording)
            self._changed.notify_all()

    def hold(self, recording: Recording, request: CapturableRequest, streamer: Any) -> bool:
        """Tell whether the reply of `request` has to wait, and keep it if so; otherwise put the reply on it."""
        if recording.reply is None and recording.handed_over:
            if all(held is not recording for held, _, _ in self._held):
                self._held.append((recording, request, streamer))
            return True
        _attach(recording, request)
        return False

    def released(self) -> list[tuple[Any, Any]]:
        """Return request and streamer of every held reply that may go out now; they are no longer held."""
        ready = [entry for entry in self._held if entry[0].reply is not None]
        if not ready:
            return []
        self._held = [entry for entry in self._held if entry[0].reply is None]
        return [(request, streamer) for _, request, streamer in ready]

    def abandon(self, recording: Recording) -> None:
        """Remove the sample of a request that was aborted: nobody waits for its reply."""
        with self._changed:
            recording.abandoned = True
            if isinstance(recording.reply, StoredReply):
                self._queue.append(recording)
                self._changed.notify_all()

    def wait(self, timeout_s: float) -> None:
        """Return when the writer has settled something, or after `timeout_s` seconds."""
        with self._changed:
            if all(recording.reply is None for recording, _, _ in self._held):
                self._changed.wait(timeout_s)

    def _write(self) -> None:
        while True:
            with self._changed:
                while not self._queue:
                    self._changed.wait()
                batch = [self._queue.popleft() for _ in range(min(_BATCH, len(self._queue)))]
            for recording in batch:
                nbytes = recording.nbytes
                reply = self._writer.settle(recording)
                with self._changed:
                    self._pending_bytes -= nbytes
                    recording.reply = reply
                    if recording.abandoned and isinstance(reply, StoredReply):
                        self._queue.append(recording)
                    self._changed.notify_all()


class _RecordingWriter:
    """Turns recordings into stored samples; the only user of the stores, all in one thread."""

    def __init__(self, open_store: Callable[[StoreAddress], WritableStore], clock: Callable[[], float]) -> None:
        self._open_store = open_store
        self._clock = clock
        self._stores: dict[StoreAddress, WritableStore] = {}

    def settle(self, recording: Recording) -> Reply:
        """Write the sample, or remove one that was abandoned after it was written; never raises."""
        order = recording.order
        assert isinstance(order, CaptureOrder)
        try:
            if isinstance(recording.reply, StoredReply):
                self._store(order.store).abort(recording.reply.ref)
                return RefusedReply(reason="the request was aborted", retryable=True)
            return self._write(order, recording)
        except Exception as error:  # whatever it is: the reply must go out, the thread go on
            logger.exception("sample %s was not written", order.sample_id)
            reason = f"{type(error).__name__}: {error}"
            return RefusedReply(reason=reason, retryable=True, store=isinstance(error, StoreError))
        finally:
            recording.aux.clear()
            recording.last.clear()

    def _write(self, order: CaptureOrder, recording: Recording) -> Reply:
        if self._clock() > order.deadline:
            late = "the request's time was over before its sample was written"
            return RefusedReply(reason=late, retryable=True, busy=True)
        store = self._store(order.store)
        started = time.perf_counter()
        capture, aux = order.identity.capture, recording.aux[0]
        hidden_size = aux.shape[1] // len(capture.layers)
        shapes = shapes_of(capture, order.num_tokens, hidden_size, aux.dtype)
        tensors = store.allocate(shapes, aux.device)
        tensors["input_ids"].copy_(torch.tensor(recording.input_ids, dtype=torch.int32))
        tensors["loss_mask"].copy_(torch.tensor(mask_of(order.loss_spans, order.num_tokens), dtype=torch.uint8))
        _gather(recording.aux, tensors["aux_hidden_states"])
        if capture.last_hidden_state:
            _gather(recording.last, tensors["last_hidden_state"])
        if not is_finite(tensors):
            return RefusedReply(reason="the target's hidden states are not finite", retryable=False)
        copied = time.perf_counter()
        ref = store.put(
            order.sample_id,
            tensors,
            identity=order.identity,
            source_task_id=order.source_task_id,
            num_tokens=order.num_tokens,
            metadata={"server": order.server, "captured_at": round(time.time(), 3)},
        )
        if self._clock() > order.deadline:
            store.abort(ref)
            late = "the sample was written after the request's time was over"
            return RefusedReply(reason=late, retryable=True, busy=True)
        return StoredReply(ref=ref, copy_s=copied - started, put_s=time.perf_counter() - copied)

    def _store(self, address: StoreAddress) -> WritableStore:
        store = self._stores.pop(address, None)
        if store is None:
            while len(self._stores) >= _OPEN_STORES:
                oldest = next(iter(self._stores))
                self._stores.pop(oldest).close()
            store = self._open_store(address)
        self._stores[address] = store  # the newest is last
        return store


def _gather(parts: list[Tensor], whole: Tensor) -> None:
    """Copy the rows of all chunks into `whole`, on the CPU; waits for the copies from the device."""
    begin = 0
    for part in parts:
        whole[begin : begin + len(part)].copy_(part)
        begin += len(part)


def _attach(recording: Recording, request: CapturableRequest) -> None:
    if recording.reply is not None:
        request.customized_info = {**(request.customized_info or {}), WIRE_KEY: [encode_reply(recording.reply)]}


def _mismatch(order: CaptureOrder, aux: Tensor, facts: ServerFacts) -> str | None:
    """Return what of the order's identity this server does not fulfil, if anything; `aux` [rows, layers * hidden]."""
    layers = list(order.identity.capture.layers)
    if order.fingerprint != facts.fingerprint:
        return f"expected the model {order.fingerprint}, this server runs {facts.fingerprint} ({facts.model_path})"
    if layers != facts.aux_layers:
        return f"expected states of layers {layers}, this server captures {facts.aux_layers}"
    if aux.shape[1] != len(layers) * facts.hidden_size:
        return f"expected {len(layers)} layers of {facts.hidden_size}, found {aux.shape[1]} values per token"
    found = str(aux.dtype).removeprefix("torch.")
    if order.identity.dtype != found:
        return f"expected states in {order.identity.dtype}, this server's are {found}"
    return None


def _probe_reply(recording: Recording, facts: ServerFacts, now: float) -> ProbeReply:
    tensors = {
        "aux_hidden_states": torch.cat(recording.aux).to("cpu"),
        "last_hidden_state": torch.cat(recording.last).to("cpu"),
    }
    recording.aux.clear()
    recording.last.clear()
    layout = plan_layout(tensors)
    buffer = torch.empty(layout.size_bytes, dtype=torch.uint8)
    pack_into(buffer, tensors, layout)
    return ProbeReply(facts=facts, now=now, tensors=layout.specs, data=buffer.numpy().tobytes())
