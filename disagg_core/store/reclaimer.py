"""Removals that have to happen: parked when they fail, retried by a background thread until the object is gone.

Objects are hard-pinned, so a key that nobody removes holds its bytes until the end of the attempt. A key of a put that
failed is removed twice, some time apart: the master may have accepted the put after it had answered the first removal.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence

from disagg_core.errors import StoreError, StoreUnavailable
from disagg_core.store.codes import Verdict, error_from_code, verdict_of

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0
SETTLE_S = 2.0
BATCH = 256
MOST_PARKED = 100_000


class Reclaimer:
    """The parked removals of one client.

    Args:
        remove: force-removes a batch of keys and returns a code for each; may raise `StoreError`.
    """

    def __init__(self, remove: Callable[[Sequence[str]], Sequence[int]]) -> None:
        self._remove = remove
        self._changed = threading.Condition()
        self._due: list[tuple[float, int, str, float, bool]] = []  # when, tie-break, key, next pause, once more
        self._order = itertools.count()
        self._in_hand = 0
        self._stopped = False
        self._thread: threading.Thread | None = None
        self.removed = 0

    def __len__(self) -> int:
        with self._changed:
            return len(self._due) + self._in_hand

    def park(self, keys: Sequence[str], *, doubtful: bool = False) -> None:
        """Remove `keys` in the background; `doubtful` ones, of failed puts, twice.

        Raises:
            StoreUnavailable: there are too many parked keys already, so the store has been away for long.
        """
        with self._changed:
            parked = len(self._due) + self._in_hand
            if parked + len(keys) > MOST_PARKED:
                raise StoreUnavailable(f"{parked} removals are parked already; the store has been away too long")
            now = time.monotonic()
            for key in keys:
                heapq.heappush(self._due, (now, next(self._order), key, FIRST_PAUSE_S, doubtful))
            if self._thread is None and not self._stopped:
                self._thread = threading.Thread(target=self._run, name="store-reclaimer", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def retry(self) -> int:
        """Try every parked removal now; return how many objects are known to be gone."""
        before = self.removed
        for _ in range(len(self) // BATCH + 1):
            if not self._round(time.monotonic() + SETTLE_S + LONGEST_PAUSE_S):
                break
        return self.removed - before

    def stop(self, timeout_s: float) -> int:
        """Try for up to `timeout_s` seconds to empty the list, end the thread, return how many keys are left."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._changed.wait_for(lambda: not (self._due or self._in_hand), timeout_s)
            self._stopped = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(timeout=max(1.0, deadline - time.monotonic()))
        return len(self)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._stopped and not (self._due and self._due[0][0] <= time.monotonic()):
                    self._changed.wait(max(0.0, self._due[0][0] - time.monotonic()) if self._due else None)
                if self._stopped:
                    return
            self._round(time.monotonic())

    def _round(self, until: float) -> int:
        """Try one batch of the keys that are due by `until`; return how many were tried."""
        with self._changed:
            batch: list[tuple[float, int, str, float, bool]] = []
            while self._due and self._due[0][0] <= until and len(batch) < BATCH:
                batch.append(heapq.heappop(self._due))
            self._in_hand += len(batch)
        if not batch:
            return 0
        codes = self._answers([key for _, _, key, _, _ in batch])
        with self._changed:
            for (_, _, key, pause, once_more), code in zip(batch, codes, strict=True):
                self._settle(key, code, pause, once_more)
            self._in_hand -= len(batch)
            self._changed.notify_all()
        return len(batch)

    def _answers(self, keys: Sequence[str]) -> Sequence[int]:
        try:
            return self._remove(keys)
        except StoreError as error:
            log.debug("removals are put off: %s", error)
            return [-900] * len(keys)

    def _settle(self, key: str, code: int, pause: float, once_more: bool) -> None:
        verdict = verdict_of(code)
        now = time.monotonic()
        if verdict in (Verdict.DONE, Verdict.LOST):
            self.removed += 1
            if once_more and code != 0:
                heapq.heappush(self._due, (now + SETTLE_S, next(self._order), key, FIRST_PAUSE_S, False))
        elif verdict is Verdict.BUG:
            log.error("%s; the key is left to the sweep", error_from_code(code, operation="remove", key=key))
        else:
            longer = min(2 * pause, LONGEST_PAUSE_S)
            heapq.heappush(self._due, (now + pause, next(self._order), key, longer, once_more))
