"""The prompts of a run as workers get them: leased in groups, encoded ahead, every one accounted for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from disagg_core.contracts import PromptTask
from disagg_core.ordinals import OrdinalSet
from disagg_core.prompts.pool import EncodedPrompts, GivenTasks, PromptPool, RejectedPrompt
from disagg_core.rollout.leases import Lease, LeaseBook
from disagg_core.run_spec.document import RunSpec
from disagg_core.target.facts import TargetFacts

EncodedGroup = dict[int, PromptTask | RejectedPrompt | None]
"""The prompts of one group by ordinal; None where the order has ended."""


RejectionKind = Literal["rejected", "refused", "quarantined"]


class Rejection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line of an attempt's ``rejected.jsonl``: a prompt that no sample was published for, and why.

    `kind` is ``rejected`` for a prompt whose own form cannot be used, ``refused`` for one that the target or the store
    would not have, and ``quarantined`` for one that used up its attempts.
    """

    ordinal: int
    source: str
    kind: RejectionKind
    reason: str
    attempts: int


@dataclass(frozen=True)
class PromptBatch:
    """What one call of a target gets: `tasks`, of which those in `leases` (by ordinal) are wanted.

    The others were trained already; they are there so that the batch is the same as in an uninterrupted run.
    """

    tasks: list[PromptTask]
    leases: dict[int, Lease]

    @property
    def avoid(self) -> dict[int, frozenset[str]]:
        """Servers on which a task has failed before, by ordinal."""
        return {ordinal: lease.avoid for ordinal, lease in self.leases.items() if lease.avoid}


class PromptSource:
    """Leases prompts to workers and keeps account of every one. Safe from several threads.

    Unseen prompts are leased in groups: all that are wanted of ordinals ``[k * group, (k + 1) * group)``, together with
    those of the group that are covered by `skip`. A group's batch is thereby the same whether the run was interrupted
    or not. Prompts that came back are leased one by one.
    """

    def __init__(
        self,
        pool: PromptPool,
        *,
        group: int = 1,
        skip: OrdinalSet | None = None,
        already_rejected: Iterable[int] = (),
        max_attempts: int = 3,
        lease_s: float = 3600.0,
        on_reject: Callable[[Rejection], None] = lambda rejection: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if group < 1:
            raise ValueError(f"expected groups of at least 1 prompt, found {group}")
        covered = OrdinalSet(pool.missing.ranges())
        for ordinal in skip or ():
            covered.add(ordinal)
        self._pool = pool
        self._group = group
        self._ahead = _Ahead(pool, group)
        self._book = LeaseBook(end=pool.end, skip=covered, max_attempts=max_attempts, lease_s=lease_s, clock=clock)
        self._book.skip_rejected(already_rejected)
        self.covered = len(skip) if skip is not None else 0
        """Prompts that a checkpoint of an earlier attempt covers."""
        self._tasks: dict[int, PromptTask] = {}
        self._on_reject = on_reject
        self._lock = threading.Lock()
        self.taken = len(self._book.rejected)
        """Prompts of this attempt that were leased or rejected, those of an earlier producer process not counted."""

    @classmethod
    def from_spec(
        cls, spec: RunSpec, tokenizer: Any, *, facts: TargetFacts | None = None, **options: Any
    ) -> PromptSource:
        """Return the source of a run document; `facts` are the target's, `options` as for the class.

        Raises:
            PromptError: the prompts are missing or empty.
        """
        options.setdefault("max_attempts", spec.rollout.max_prompt_attempts)
        return cls(EncodedPrompts(spec, tokenizer, facts=facts), **options)

    @classmethod
    def of_tasks(cls, tasks: Sequence[PromptTask], **options: Any) -> PromptSource:
        """Return a source over tasks at hand; `options` as for the class."""
        return cls(GivenTasks(tasks), **options)

    def skip_done(self, ordinals: Iterable[int]) -> None:
        """Leave out prompts whose samples an earlier producer process of this attempt has published."""
        with self._lock:
            self._book.skip_done(ordinals)

    # --- leasing ---------------------------------------------------------------------------------------------------

    @property
    def group(self) -> int:
        """The most prompts that one lease holds."""
        return self._group

    def lease_again(self, worker: str) -> PromptBatch | None:
        """Lease one prompt that came back to `worker`, alone; None if there is none that may go out now."""
        with self._lock:
            lease = self._book.take_waiting(worker)
            return None if lease is None else PromptBatch([self._tasks[lease.ordinal]], {lease.ordinal: lease})

    def lease_next(self, worker: str) -> PromptBatch | None:
        """Lease the next group of unseen prompts to `worker`; None if there are none left.

        Prompts that cannot be used are rejected on the way.
        """
        with self._lock:
            while (first := self._book.next_unseen) is not None:
                batch = self._lease_group(first // self._group, worker)
                if batch.leases:
                    return batch
            return None

    def lease(self, worker: str) -> PromptBatch | None:
        """Lease what came back, else what is next; None if there is nothing to lease at present (see `drained`)."""
        return self.lease_again(worker) or self.lease_next(worker)

    def upcoming(self, count: int) -> list[int]:
        """Return the next `count` ordinals that were never leased."""
        with self._lock:
            return self._book.upcoming(count)

    def _lease_group(self, number: int, worker: str) -> PromptBatch:
        tasks: dict[int, PromptTask | RejectedPrompt] = {}
        for ordinal, task in self._ahead.take(number).items():
            if task is None:
                self._book.set_end(ordinal if self._pool.end is None else self._pool.end)
                break
            tasks[ordinal] = task
        leases: dict[int, Lease] = {}
        for lease in self._book.take_unseen(worker, (number + 1) * self._group):
            self.taken += 1
            task = tasks[lease.ordinal]
            if isinstance(task, RejectedPrompt):
                self._book.reject(lease)
                self._tell(lease.ordinal, task.source, "rejected", task.reason, 0)
            else:
                self._tasks[lease.ordinal] = task
                leases[lease.ordinal] = lease
        return PromptBatch([task for task in tasks.values() if isinstance(task, PromptTask)], leases)

    def _tell(self, ordinal: int, source: str, kind: RejectionKind, reason: str, attempts: int) -> None:
        self._on_reject(Rejection(ordinal=ordinal, source=source, kind=kind, reason=reason, attempts=attempts))

    # --- answers ---------------------------------------------------------------------------------------------------

    def holds(self, lease: Lease) -> bool:
        """Tell whether `lease` is in force."""
        with self._lock:
            return self._book.holds(lease)

    def complete(self, lease: Lease) -> bool:
        """The prompt's sample is published or about to be; False if the lease is stale and the sample must go."""
        with self._lock:
            completed = self._book.complete(lease)
            if completed:
                del self._tasks[lease.ordinal]
            return completed

    def fail(self, lease: Lease, reason: str, server: str) -> bool:
        """Count a failed attempt; True if the prompt is quarantined now."""
        with self._lock:
            quarantined = self._book.fail(lease, reason, server)
            if quarantined:
                task = self._tasks.pop(lease.ordinal)
                self._tell(lease.ordinal, task.source, "quarantined", reason, lease.failures + 1)
            return quarantined

    def reject(self, lease: Lease, reason: str, *, own_form: bool = False) -> bool:
        """Take an unusable prompt out, for its own form or not; False if the lease is stale."""
        with self._lock:
            rejected = self._book.reject(lease)
            if rejected:
                task = self._tasks.pop(lease.ordinal)
                kind: RejectionKind = "rejected" if own_form else "refused"
                self._tell(lease.ordinal, task.source, kind, reason, lease.failures + 1)
            return rejected

    def give_back(self, lease: Lease) -> bool:
        """Return a prompt that was not attempted; False if the lease is stale."""
        with self._lock:
            return self._book.give_back(lease)

    def expire(self) -> list[int]:
        """Fail the leases that are overdue; return the ordinals that were quarantined by it."""
        with self._lock:
            expired = self._book.expire()
            for lease, quarantined in expired:
                if quarantined:
                    task = self._tasks.pop(lease.ordinal)
                    reason = f"no answer from {lease.worker} before its lease ended"
                    self._tell(lease.ordinal, task.source, "quarantined", reason, lease.failures + 1)
            return [lease.ordinal for lease, quarantined in expired if quarantined]

    # --- counts ----------------------------------------------------------------------------------------------------

    @property
    def drained(self) -> bool:
        """Whether nothing is pending and nothing is leased."""
        with self._lock:
            return self._book.drained

    @property
    def exhausted(self) -> bool:
        """Whether no prompt is left that was never leased; others may still come back."""
        with self._lock:
            return self._book.next_unseen is None

    @property
    def rejected(self) -> int:
        """Prompts rejected or quarantined in this attempt."""
        with self._lock:
            return len(self._book.rejected)

    @property
    def end(self) -> int | None:
        """Ordinals over all epochs, if known."""
        return self._pool.end

    def close(self) -> None:
        """End encoding and close the files of the prompts."""
        self._ahead.close()
        self._pool.close()


class _Ahead:
    """Encodes the group after the one that was asked for, while the target works on that one."""

    def __init__(self, pool: PromptPool, group: int) -> None:
        self._pool = pool
        self._group = group
        self._missing = pool.missing
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="prompts")
        self._next: tuple[int, Future[EncodedGroup]] | None = None

    def take(self, number: int) -> EncodedGroup:
        """Return group `number`. A stream is read forward only, so what is under way is waited for in any case."""
        ahead, self._next = self._next, None
        encoded = ahead[1].result() if ahead is not None else {}
        if ahead is None or ahead[0] != number:
            encoded = self._encode(number)
        if None not in encoded.values():
            self._next = (number + 1, self._executor.submit(self._encode, number + 1))
        return encoded

    def _encode(self, number: int) -> EncodedGroup:
        encoded: EncodedGroup = {}
        for ordinal in range(number * self._group, (number + 1) * self._group):
            if ordinal not in self._missing:
                encoded[ordinal] = self._pool.task(ordinal)
                if encoded[ordinal] is None:
                    break
        return encoded

    def close(self) -> None:
        """End the thread."""
        self._executor.shutdown(cancel_futures=True)
