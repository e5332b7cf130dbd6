"""Removes the samples of windows that are acknowledged, in a thread of its own: no step waits for the store's answer.

A window comes here after its acknowledgement, so nothing is removed that might have to be trained again. One that is
not yet removed when the process dies is swept up with the attempt.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from disagg_core.contracts import SampleRef
from disagg_core.errors import StoreError
from disagg_core.store import MooncakeFeatureStore

_log = logging.getLogger(__name__)


class Freeing:
    """Frees samples of `store`, those of one window after the other."""

    def __init__(self, store: MooncakeFeatureStore) -> None:
        self._store = store
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="freeing")
        self._last: Future[None] | None = None

    def free(self, refs: Sequence[SampleRef]) -> None:
        """Begin to remove the samples of `refs`, once those of the window before are removed.

        Raises:
            StoreError: the window before could not be handed to the store.
        """
        if self._last is not None:
            self._last.result()
        self._last = self._thread.submit(self._store.release_many, refs)

    def close(self) -> None:
        """Wait until what was begun is done; what failed is logged and left to the sweep."""
        self._thread.shutdown()
        error = self._last.exception() if self._last is not None else None
        if isinstance(error, StoreError):
            _log.error("the samples of the last window are left to the sweep: %s", error)
        elif error is not None:
            raise error
