"""What follows a trained window, in a thread of its own: no step waits for the channel's disk or the store's answer.

A window is acknowledged, then its samples are removed, and only then is it the next one's turn: nothing is removed
that might have to be trained again. Where one cannot be acknowledged the fit ends, with weights that hold it: it is
removed all the same. What is left when the process dies is swept up with the attempt.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from disagg_core.contracts import SampleRef
from disagg_core.errors import ChannelError, Preempted, StoreError
from disagg_core.store import MooncakeFeatureStore

WINDOWS_AHEAD = 8
"""Training goes on while so many windows wait to be settled: a disk may need the time of several steps for one sync."""
_log = logging.getLogger(__name__)


class Settling:
    """Acknowledges windows and frees their samples of `store`, one window after the other."""

    def __init__(self, store: MooncakeFeatureStore) -> None:
        self._store = store
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="settling")
        self._begun: deque[Future[None]] = deque()
        self.unacknowledged: ChannelError | Preempted | None = None
        """Why a window could not be acknowledged. After it none is tried: each would wait for the channel as long."""

    def settle(self, acknowledge: Callable[[], None], samples: Sequence[SampleRef]) -> None:
        """Begin to acknowledge a window and to remove `samples`, after the windows before.

        Waits while `WINDOWS_AHEAD` are not settled.

        Raises:
            StoreError: the samples of a window before could not be handed to the store.
        """
        self._look(WINDOWS_AHEAD - 1)
        self._begun.append(self._thread.submit(self._settled, acknowledge, samples))

    def wait(self, timeout_s: float) -> bool:
        """Return whether what was begun is done, as soon as it is or after `timeout_s` seconds; raises as `settle`."""
        wait(self._begun, timeout_s)
        self._look(len(self._begun))
        return not self._begun

    def _look(self, allowed: int) -> None:
        """Raise what a window ended with; wait until no more than `allowed` are not settled."""
        while self._begun and (len(self._begun) > allowed or self._begun[0].done()):
            self._begun.popleft().result()

    def close(self) -> None:
        """Wait until what was begun is done; what failed is logged and left to the sweep."""
        self._thread.shutdown()
        while self._begun:
            error = self._begun.popleft().exception()
            if isinstance(error, StoreError):
                _log.error("samples that were trained are left to the sweep: %s", error)
            elif error is not None:
                raise error

    def _settled(self, acknowledge: Callable[[], None], samples: Sequence[SampleRef]) -> None:
        if self.unacknowledged is None:
            try:
                acknowledge()
            except (ChannelError, Preempted) as error:
                _log.warning("a window, and those after it, could not be acknowledged: %s", error)
                self.unacknowledged = error
        if samples:
            self._store.release_many(samples)
