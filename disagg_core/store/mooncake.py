"""`MooncakeFeatureStore`: samples in, samples out, nothing dropped, nothing left behind.

What it holds:

- Every try to put a sample uses a fresh key (a put on an existing or half-written key answers 0 and writes nothing),
  and every object is hard-pinned: only a consumer's `release` or a sweep frees it.
- A full store makes the producer wait. A damaged or vanished sample is retried, then reported as `SampleLost`.
- What could not be removed is parked and retried; keys of failed puts are removed, since the master may have them.
- Native calls release the GIL and run on a bounded number of threads: `submit_put`, `submit_get`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import torch
from torch import Tensor

from disagg_core.contracts import RunIdentity, SampleRef
from disagg_core.errors import BadInput, DraftlineError, StoreMisuse
from disagg_core.store.capacity import STAGING_BYTES
from disagg_core.store.codes import Verdict, error_from_code, verdict_of
from disagg_core.store.devices import DeviceCopies, named, written_so_far
from disagg_core.store.endpoints import StoreEndpoints
from disagg_core.store.master import MasterView, StoreHealth
from disagg_core.store.memory import TransferMemory
from disagg_core.store.outgoing import CPU, Outgoing, Shapes, layout_of
from disagg_core.store.packing import grouped, in_a_row, unpack
from disagg_core.store.reclaimer import Reclaimer
from disagg_core.store.references import (
    Metadata,
    NewSample,
    check_identity,
    check_key,
    check_reference,
    make_reference,
    pattern_of,
)
from disagg_core.store.session import Session
from disagg_core.store.transfers import Link, SampleReader, SampleWriter

log = logging.getLogger(__name__)

LENT_FROM_BYTES = 256 << 10


class MooncakeFeatureStore:
    """One process's access to the store. It mounts no memory of its own; use it as a context manager.

    Args:
        endpoints: the master and its metrics port.
        namespace: ``run/attempt``; the keys begin with it, and references of another namespace are refused.
        host: the address of this machine that the owners can reach.
        protocol: ``tcp`` or ``rdma``.
        checksum: CRC-32 of every sample, at put and at get.
        put_timeout_s: how long a put waits for room in a full store.
        retry_timeout_s: how long a master or an owner that does not answer properly is tried again.
        connect_timeout_s: how long to wait for the master at the start.
        staging_bytes: transfer memory for each direction, taken when first used and given up when idle, and as much
            for what is allocated and for what is handed out in place; see `capacity.staging_bytes_for`. A sample that
            does not fit makes it larger.
        threads: threads of `submit_put` and as many of `submit_get`.
        expected: what the references of this run must carry; others are refused. None accepts every identity.
        wrap: put around the native client; for fault injection.

    Raises:
        MissingLibrary: Mooncake cannot be loaded.
        StoreUnavailable: nothing answers at the endpoints.
        BadInput: an argument is out of its range.
    """

    def __init__(
        self,
        endpoints: StoreEndpoints,
        *,
        namespace: str,
        host: str = "127.0.0.1",
        protocol: str = "tcp",
        checksum: bool = True,
        put_timeout_s: float = 300.0,
        retry_timeout_s: float = 25.0,
        connect_timeout_s: float = 10.0,
        staging_bytes: int = STAGING_BYTES,
        threads: int = 2,
        expected: RunIdentity | None = None,
        wrap: Callable[[Any], Any] = lambda client: client,
    ) -> None:
        if not namespace or namespace.startswith("/") or namespace.endswith("/"):
            raise BadInput(f"namespace: expected run/attempt such as nightly/1, found {namespace!r}")
        if min(staging_bytes, threads) <= 0:
            raise BadInput(f"expected staging_bytes and threads above 0, found {staging_bytes} and {threads}")
        self.endpoints = endpoints
        self.namespace = namespace
        self.staging_bytes = staging_bytes
        self._uri = f"mooncake://{endpoints.master_address}/{namespace}"
        self._expected = expected
        self._room_timeout_s = put_timeout_s + retry_timeout_s  # others wait for room with staging memory in hand
        self._master = MasterView(endpoints)
        self._session = Session(endpoints, host=host, protocol=protocol, connect_timeout_s=connect_timeout_s, wrap=wrap)
        self._reclaimer = Reclaimer(self._remove_parked)
        self._link = Link(
            session=self._session,
            master=self._master,
            reclaimer=self._reclaimer,
            namespace=namespace,
            checksum=checksum,
            full_timeout_s=put_timeout_s,
            retry_timeout_s=retry_timeout_s,
        )
        self._memory = TransferMemory(self._session, staging_bytes)
        self._in, self._lent = self._memory.pool("incoming"), self._memory.pool("lent")
        self._out = Outgoing(self._memory.pool)
        self._writer = SampleWriter(self._link)
        self._reader = SampleReader(self._link)
        self._copies = DeviceCopies()
        self._putters = ThreadPoolExecutor(threads, thread_name_prefix="store-put")
        self._getters = ThreadPoolExecutor(threads, thread_name_prefix="store-get")
        self._submitted = threading.BoundedSemaphore(4 * threads)

    # --- put ------------------------------------------------------------------------------------------------------

    def allocate(self, shapes: Shapes, filled_from: torch.device = CPU) -> Mapping[str, Tensor]:
        """Return uninitialised CPU tensors for one sample, from transfer memory while there is room.

        Given to `put` as it is, the filled mapping is sent from where it lies; a put of anything else copies it first.
        The tensors belong to the caller for as long as it holds them.

        Args:
            shapes: shape and dtype of each tensor, in the order in which they will be put.
            filled_from: where what will be copied into them lies; for a GPU the memory is page-locked.

        Raises:
            BadInput: a dtype is not in `packing.DTYPES`.
            StoreMisuse: after close, or in a forked child.
        """
        with self._session.operation():
            return self._out.allocate(shapes, named(filled_from))

    def put(
        self,
        sample_id: str,
        tensors: Mapping[str, Tensor],
        *,
        identity: RunIdentity,
        source_task_id: str,
        num_tokens: int,
        metadata: Metadata | None = None,
    ) -> SampleRef:
        """Store a sample and return its reference; when this returns, the sample can be read by anyone.

        Args:
            sample_id: the same in every attempt.
            tensors: dense tensors on any device, of any dtype in `packing.DTYPES`, contiguous or not.
            identity: what captured the sample; its run and attempt must be this store's namespace.
            source_task_id: the prompt that the sample was captured from.
            num_tokens: tokens of the sample.
            metadata: for people; nothing may depend on it.

        Raises:
            StoreFull: no room came free within `put_timeout_s`, or the sample is larger than an owner's memory.
            StoreUnavailable: the master or an owner is away for `retry_timeout_s`.
            StoreMisuse: `identity` is of another run or attempt; or fork, or use after close.
            BadInput: a tensor cannot be stored.
        """
        sample = NewSample(sample_id, tensors, source_task_id, num_tokens, metadata or {})
        with self._session.operation():
            return self._put([sample], identity, [written_so_far(tensors)])[0]

    def put_many(self, samples: Iterable[NewSample], *, identity: RunIdentity) -> list[SampleRef]:
        """Store many samples, small ones several to a call; return their references in order.

        If one of them fails, those stored before it are removed again and its error is raised (see `put`).
        """
        refs: list[SampleRef] = []
        listed = list(samples)
        with self._session.operation():
            try:
                for batch in grouped(listed, [layout_of(sample.tensors).size_bytes for sample in listed]):
                    refs += self._put(batch, identity, [written_so_far(sample.tensors) for sample in batch])
            except DraftlineError:
                self._reclaimer.park([ref.key for ref in refs])
                raise
        return refs

    def submit_put(
        self,
        sample_id: str,
        tensors: Mapping[str, Tensor],
        *,
        identity: RunIdentity,
        source_task_id: str,
        num_tokens: int,
        metadata: Metadata | None = None,
    ) -> Future[SampleRef]:
        """`put` on another thread. The tensors must not be changed before the future is done.

        Blocks while four puts for each thread are under way, so that a producer cannot run ahead of its store.
        """
        sample = NewSample(sample_id, tensors, source_task_id, num_tokens, metadata or {})
        ready = written_so_far(tensors)
        self._session.check()
        self._submitted.acquire()
        try:
            future = self._putters.submit(self._put_submitted, sample, identity, ready)
        except RuntimeError as error:
            self._submitted.release()
            raise StoreMisuse("the feature store was closed while a put was submitted") from error
        future.add_done_callback(lambda _: self._submitted.release())
        return future

    def _put_submitted(self, sample: NewSample, identity: RunIdentity, ready: torch.cuda.Event | None) -> SampleRef:
        with self._session.operation():
            return self._put([sample], identity, [ready])[0]

    def _put(
        self, batch: Sequence[NewSample], identity: RunIdentity, ready: Sequence[torch.cuda.Event | None]
    ) -> list[SampleRef]:
        check_identity(identity, self.namespace)
        begin = time.perf_counter()
        with self._out.packed([sample.tensors for sample in batch], ready, self._room_timeout_s) as packed:
            crcs = [self._link.checksum_of(slot.memory) for slot, _ in packed]
            if len(batch) == 1:
                keys = [self._writer.write(packed[0].slot, batch[0].sample_id)]
            else:
                keys = self._writer.write_batch([slot for slot, _ in packed], [sample.sample_id for sample in batch])
        total = sum(layout.size_bytes for _, layout in packed)
        self._link.counters.add(puts=len(batch), put_bytes=total, put_seconds=time.perf_counter() - begin)
        return [
            make_reference(sample, layout, key, crc, identity, self._uri)
            for sample, (_, layout), key, crc in zip(batch, packed, keys, crcs, strict=True)
        ]

    # --- get ------------------------------------------------------------------------------------------------------

    def get(self, ref: SampleRef, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """Return the sample's tensors, verified; they belong to the caller for as long as it holds them.

        The tensors of one sample share one block of memory. The sample stays in the store until `release`.

        Raises:
            SampleLost: the sample is gone or damaged beyond retry; it has to be captured again.
            StoreUnavailable: the master or an owner is away for `retry_timeout_s`.
            StoreMisuse: `ref` is of another run or attempt; or fork, or use after close.
            BadInput: `ref` is of another schema or identity, or its layout disagrees with its size.
        """
        check_reference(ref, self.namespace, self._expected)
        begin = time.perf_counter()
        with self._session.operation():
            tensors = self._get(ref, named(device), time.monotonic())
        self._link.counters.add(gets=1, get_bytes=ref.size_bytes, get_seconds=time.perf_counter() - begin)
        return tensors

    def get_many(self, refs: Sequence[SampleRef], device: str | torch.device = "cpu") -> list[dict[str, Tensor]]:
        """Return the tensors of many samples in order, small ones read several at a time; errors as in `get`."""
        where = named(device)
        for ref in refs:
            check_reference(ref, self.namespace, self._expected)
        begin = time.perf_counter()
        samples: list[dict[str, Tensor]] = []
        with self._session.operation():
            for batch in grouped(refs, [ref.size_bytes for ref in refs]):
                samples += self._get_batch(batch, where, time.monotonic())
        total = sum(ref.size_bytes for ref in refs)
        self._link.counters.add(gets=len(refs), get_bytes=total, get_seconds=time.perf_counter() - begin)
        return samples

    def submit_get(self, ref: SampleRef, device: str | torch.device = "cpu") -> Future[dict[str, Tensor]]:
        """`get` on another thread."""
        self._session.check()
        try:
            return self._getters.submit(self.get, ref, named(device))
        except RuntimeError as error:
            raise StoreMisuse("the feature store was closed while a get was submitted") from error

    def _get(self, ref: SampleRef, device: torch.device, began: float) -> dict[str, Tensor]:
        size = ref.size_bytes
        to_lend = self._lent.acquire_now(size) if device.type == "cpu" and size >= LENT_FROM_BYTES else None
        with to_lend or self._in.acquire(size, self._link.retry_timeout_s) as slot:
            self._reader.read(ref, slot, began)
            if slot is to_lend and not slot.tainted:
                return unpack(slot.lend(), ref.feature_specs)
            return self._copies.hand_out(self._in, slot.buffer, ref.feature_specs, device)

    def _get_batch(self, refs: Sequence[SampleRef], device: torch.device, began: float) -> list[dict[str, Tensor]]:
        if len(refs) == 1:
            return [self._get(refs[0], device, began)]
        offsets, total = in_a_row([ref.size_bytes for ref in refs])
        samples: dict[int, dict[str, Tensor]] = {}
        with self._in.acquire(total, self._link.retry_timeout_s) as slot:
            whole = self._reader.read_batch(refs, slot, offsets)
            for index, ref in enumerate(refs):
                if whole[index]:
                    part = slot.buffer[offsets[index] : offsets[index] + ref.size_bytes]
                    samples[index] = self._copies.hand_out(self._in, part, ref.feature_specs, device)
        return [samples[index] if index in samples else self._get(ref, device, began) for index, ref in enumerate(refs)]

    # --- lifetime -------------------------------------------------------------------------------------------------

    def release(self, ref: SampleRef) -> None:
        """Free a sample that was consumed; a removal that fails is parked and tried again in the background."""
        self.release_many([ref])

    def release_many(self, refs: Sequence[SampleRef]) -> None:
        """Free many samples with one call."""
        with self._session.operation():
            self._free(refs)
        self._link.counters.add(released=len(refs))

    def abort(self, ref: SampleRef) -> None:
        """Free a sample that nobody will consume, whoever has put it."""
        with self._session.operation():
            self._free([ref])
        self._link.counters.add(aborted=1)

    def gc(self) -> int:
        """Try the parked removals now; return how many objects are known to be gone."""
        with self._session.operation():
            return self._reclaimer.retry()

    def sweep(self, prefix: str | None = None) -> int:
        """Remove every object under `prefix` (by default this store's namespace); return how many there were.

        `prefix` is a whole number of key parts: ``nightly`` sweeps all attempts of the run and leaves ``nightly-2``.

        Raises:
            StoreUnavailable: the master does not answer.
        """
        pattern = pattern_of(self.namespace if prefix is None else prefix)
        with self._session.operation():
            found = self._session.client.remove_by_regex(pattern, True)
        if found < 0:
            raise error_from_code(found, operation="sweep", key=pattern)
        self._link.counters.add(swept=found)
        return int(found)

    def key_count(self, prefix: str | None = None) -> int:
        """Return how many objects there are under `prefix` (by default this store's namespace)."""
        return len(self._master.keys(f"{self.namespace if prefix is None else prefix.rstrip('/')}/"))

    def health(self) -> StoreHealth:
        """Return the store's usage as its master sees it.

        Raises:
            StoreUnavailable: the master does not answer.
        """
        return self._master.health()

    @property
    def counters(self) -> dict[str, int | float]:
        """Counts, bytes and seconds since the store was opened, and the transfer memory it holds."""
        held = {"parked_removals": len(self._reclaimer), "staging_bytes": self._memory.total_bytes}
        return {**self._link.counters.snapshot(), **held}

    def close(self) -> None:
        """Let the transfers in progress end, try parked removals for a few seconds, then disconnect.

        Does nothing in a forked child, or a second time. Waiting puts end with `StoreMisuse`.
        """
        if not self._session.end_operations():
            return
        self._putters.shutdown(cancel_futures=True)
        self._getters.shutdown(cancel_futures=True)
        left = self._reclaimer.stop(timeout_s=5.0)
        if left:
            log.warning("%d objects under %s could not be removed; they are left to the sweep", left, self.namespace)
        self._memory.stop()
        self._session.close()
        self._memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _free(self, refs: Sequence[SampleRef]) -> None:
        for ref in refs:
            check_key(ref, self.namespace)
        keys = [ref.key for ref in refs]
        codes = _removal_codes(self._session.client, keys)
        failed = [key for key, code in zip(keys, codes, strict=True) if code and verdict_of(code) not in _GONE]
        if failed:
            self._link.counters.add(failed_removals=len(failed))
            self._reclaimer.park(failed)

    def _remove_parked(self, keys: Sequence[str]) -> Sequence[int]:
        with self._session.raw() as client:
            return _removal_codes(client, keys)


def _removal_codes(client: Any, keys: Sequence[str]) -> Sequence[int]:
    return [client.remove(keys[0], True)] if len(keys) == 1 else client.batch_remove(list(keys), True)


_GONE = (Verdict.DONE, Verdict.LOST)
