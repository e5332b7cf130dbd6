"""Waiting out a channel that is away for a moment: a mount that hiccups, a server that restarts."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from disagg_core.errors import ChannelUnavailable

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

_PAUSE_S = 0.25


class Patience:
    """Calls again what raises `ChannelUnavailable`, for up to `limit_s` seconds each time; then the error goes on.

    `check` is called before every further try and raises what is to end the waiting sooner.
    """

    def __init__(
        self,
        limit_s: float,
        *,
        check: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], object] | None = None,
    ) -> None:
        self._limit_s = limit_s
        self._check = check
        self._clock = clock
        self._wait = wait or threading.Event().wait

    def __call__(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what `call` returns, once the channel is there.

        Raises:
            ChannelUnavailable: it was away for too long.
        """
        away_since: float | None = None
        while True:
            try:
                return call(*args, **kwargs)
            except ChannelUnavailable as error:
                now = self._clock()
                if away_since is None:
                    away_since = now
                    log.warning("the channel is away, trying again for up to %g s: %s", self._limit_s, error)
                if now - away_since >= self._limit_s:
                    raise
            self._check()
            self._wait(_PAUSE_S)
