"""Moving packed samples between staging memory and the store, with every answer checked and every retry bounded.

`SampleWriter` uses a fresh key for each try and hands the keys of failed tries to the reclaimer. `SampleReader`
compares size and checksum and tells damage from loss. Both work on staging slots, inside an operation of the session,
and know nothing of tensors.
"""

from __future__ import annotations

import itertools
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

from isal.isal_zlib import crc32

from disagg_core.contracts import SampleRef
from disagg_core.errors import SampleLost, StoreError, StoreUnavailable
from disagg_core.processes.retry import Tries
from disagg_core.store.codes import Verdict, error_from_code, is_settled, verdict_of
from disagg_core.store.master import MasterView
from disagg_core.store.reclaimer import Reclaimer
from disagg_core.store.session import Session
from disagg_core.store.staging import Slot

DAMAGE_TRIES = 4
LOSS_TRIES = 2
FIRST_PAUSE_S = 0.002
LONGEST_PAUSE_S = 0.1

COUNTERS = (
    "puts",
    "put_bytes",
    "put_seconds",
    "put_retries",
    "full_answers",
    "full_wait_seconds",
    "gets",
    "get_bytes",
    "get_seconds",
    "get_retries",
    "damaged_reads",
    "samples_lost",
    "released",
    "aborted",
    "failed_removals",
    "swept",
)
PUT_TROUBLE = ("put_retries", "full_answers", "full_wait_seconds", "failed_removals")
"""What a producer's metrics show of the counters."""
GET_TROUBLE = ("get_retries", "damaged_reads", "samples_lost", "failed_removals")
"""What a trainer's metrics show of the counters."""


class Counters:
    """Named counts, bytes and seconds that several threads add to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, int | float] = dict.fromkeys(COUNTERS, 0)

    def add(self, **amounts: int | float) -> None:
        """Add to the counters named."""
        with self._lock:
            for name, amount in amounts.items():
                self._values[name] += amount

    def snapshot(self) -> dict[str, int | float]:
        """Return all counters."""
        with self._lock:
            return dict(self._values)


@dataclass(frozen=True)
class Link:
    """What one client's transfers share."""

    session: Session
    master: MasterView
    reclaimer: Reclaimer
    namespace: str
    checksum: bool
    full_timeout_s: float
    retry_timeout_s: float
    counters: Counters = field(default_factory=Counters)

    def checksum_of(self, memory: memoryview) -> int | None:
        """Return the CRC-32 of `memory`, or None when checksums are switched off."""
        return crc32(memory) if self.checksum else None

    def tries(self, began: float) -> Tries[Verdict]:
        """Return the tries of one transfer, the first of which began at `began`; they end when the client is closed."""
        return Tries(
            {**dict.fromkeys(Verdict, self.retry_timeout_s), Verdict.FULL: self.full_timeout_s},
            began=began,
            every_s=FIRST_PAUSE_S,
            longest_s=LONGEST_PAUSE_S,
            on_wait=self.session.check,
        )


class SampleWriter:
    """Puts of packed samples."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._name = uuid.uuid4().hex
        self._tries = itertools.count()

    def write(self, slot: Slot, sample_id: str) -> str:
        """Store the bytes of `slot` and return the key they are under.

        Raises:
            StoreFull: no room came free before the deadline, or the sample can never fit.
            StoreUnavailable: the master or an owner did not answer properly before the retry deadline.
        """
        session, began = self._link.session, time.monotonic()
        tries = None
        while True:
            key = self.new_key(sample_id)
            code = session.client.put_from(key, slot.address, slot.size, session.hard_pin)
            if code == 0:
                return key
            if not is_settled(code):
                slot.keep_mapped()
            tries = tries or self._link.tries(began)
            self._after_failure(key, code, slot.size, tries)

    def write_batch(self, slots: Sequence[Slot], sample_ids: Sequence[str]) -> list[str]:
        """Store several samples with one call; return their keys.

        What the batch call could not store is put one by one; if that fails too, nothing of the batch stays.
        """
        link = self._link
        keys = [self.new_key(sample_id) for sample_id in sample_ids]
        addresses, sizes = [slot.address for slot in slots], [slot.size for slot in slots]
        codes = link.session.client.batch_put_from(keys, addresses, sizes, link.session.hard_pin)
        stored = [key for key, code in zip(keys, codes, strict=True) if code == 0]
        try:
            for index, code in enumerate(codes):
                if code:
                    if not is_settled(code):
                        slots[index].keep_mapped()
                    self._after_failure(keys[index], code, sizes[index], link.tries(time.monotonic()))
                    keys[index] = self.write(slots[index], sample_ids[index])
                    stored.append(keys[index])
        except StoreError:
            link.reclaimer.park(stored)
            raise
        return keys

    def new_key(self, sample_id: str) -> str:
        """Return a key that was never used: no other writer has this one's name."""
        return f"{self._link.namespace}/{sample_id}/{self._name}-{next(self._tries):x}"

    def _after_failure(self, key: str, code: int, size: int, tries: Tries[Verdict]) -> None:
        """Pause before the next try, or raise the named error."""
        link, verdict = self._link, verdict_of(code)
        if verdict is Verdict.FULL:
            link.counters.add(full_answers=1)
            if not tries.allows(verdict) or self._never_fits(size):
                raise error_from_code(code, operation="put", key=key, note=self._room(size))
            link.counters.add(full_wait_seconds=tries.pause())
            return
        link.reclaimer.park([key], doubtful=True)
        link.counters.add(put_retries=1)
        if verdict is Verdict.BUG:
            raise error_from_code(code, operation="put", key=key)
        if not tries.allows(verdict):
            raise error_from_code(code, operation="put", key=key, note=f"tried for {link.retry_timeout_s:g} s")
        tries.pause()

    def _never_fits(self, size: int) -> bool:
        sizes = [segment.size_bytes for segment in self._link.master.segments()]
        if not sizes:
            raise StoreUnavailable(
                f"the master at {self._link.master.endpoints.master_address} has no owner: expected mounted memory, "
                "found none; start an owner (python -m disagg_core.store.owner) or look at its log"
            )
        return size > max(sizes)

    def _room(self, size: int) -> str:
        health = self._link.master.health()
        return (
            f"{size} bytes were asked for, {health.used_bytes} of {health.total_bytes} bytes are used by {health.keys} "
            f"samples"
        )


class SampleReader:
    """Gets of packed samples."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def read(self, ref: SampleRef, slot: Slot, began: float) -> None:
        """Fill `slot` with the sample's verified bytes; `began` is when the caller began to wait.

        All tries use the same slot: what a given-up one may still write are bytes of this sample.

        Raises:
            SampleLost: the object is gone, or its bytes are wrong every time.
            StoreUnavailable: the master or an owner did not answer properly before the retry deadline.
        """
        link, tries = self._link, None
        damaged = lost = 0
        while True:
            code, crc = self._fetch(slot, ref)
            if code == ref.size_bytes and crc == self._expected(ref):
                return
            tries = tries or link.tries(began)
            verdict = verdict_of(code)
            link.counters.add(get_retries=1)
            if verdict is Verdict.DONE:
                damaged += 1
                link.counters.add(damaged_reads=1)
                if damaged >= DAMAGE_TRIES:
                    raise self._damaged(ref, code, crc)
            elif verdict is Verdict.LOST:
                lost += 1
                if lost >= LOSS_TRIES:
                    link.counters.add(samples_lost=1)
                    raise error_from_code(code, operation="get", key=ref.key)
            elif verdict is Verdict.BUG:
                raise error_from_code(code, operation="get", key=ref.key)
            elif not tries.allows(verdict):
                raise error_from_code(code, operation="get", key=ref.key, note=f"tried for {link.retry_timeout_s:g} s")
            tries.pause()

    def read_batch(self, refs: Sequence[SampleRef], slot: Slot, offsets: Sequence[int]) -> list[bool]:
        """Read several samples into one slot with one call; return which of them arrived whole."""
        link = self._link
        addresses = [slot.address + offset for offset in offsets]
        sizes = [ref.size_bytes for ref in refs]
        codes = link.session.client.batch_get_into([ref.key for ref in refs], addresses, sizes)
        slot.tainted = not all(is_settled(code) for code in codes)
        return [
            code == ref.size_bytes and self._sum(slot.memory[offset : offset + code]) == self._expected(ref)
            for ref, offset, code in zip(refs, offsets, codes, strict=True)
        ]

    def _fetch(self, slot: Slot, ref: SampleRef) -> tuple[int, int | None]:
        """Return the answer and, for a whole read, the checksum of what arrived."""
        code = self._link.session.client.get_into(ref.key, slot.address, ref.size_bytes)
        slot.tainted = slot.tainted or not is_settled(code)
        return code, self._sum(slot.memory) if code == ref.size_bytes else None

    def _sum(self, memory: memoryview) -> int | None:
        return self._link.checksum_of(memory)

    def _expected(self, ref: SampleRef) -> int | None:
        return ref.crc32 if self._link.checksum else None

    def _damaged(self, ref: SampleRef, code: int, crc: int | None) -> SampleLost:
        self._link.counters.add(samples_lost=1)
        found = f"{code} bytes" if code != ref.size_bytes else f"CRC-32 {crc:#010x}"
        return SampleLost(
            f"sample {ref.sample_id} under {ref.key}: expected {ref.size_bytes} bytes with CRC-32 {ref.crc32}, found "
            f"{found} {DAMAGE_TRIES} times; its bytes are damaged and it has to be captured again"
        )
