"""The trainer's own watch over itself: a rank that gets nowhere shows where it hangs, and ends.

Whatever it hangs in, a collective whose peer is gone, a mount, a kernel, cannot be interrupted from Python. So the
stacks of all threads go to the log, the outcome says `stalled`, and the process exits.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

from disagg_core.errors import DraftlineError, RoleFailed

_LOOK_S = 1.0
_LAST_WORDS_S = 5.0
"""Between the stacks and the exit: the first rank that exits has the others ended, which are to show theirs too."""
_PY_SPY_S = 20.0

_log = logging.getLogger(__name__)


class Watch:
    """When was the last progress? Pure; the clock is passed in."""

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_s = limit_s
        self._clock = clock
        self._last = (clock(), "starting")

    def note(self, what: str) -> None:
        """Take note of progress, or of a wait that somebody else watches over."""
        self._last = (self._clock(), what)

    def overdue(self) -> RoleFailed | None:
        """Return what to fail with once there was no progress for longer than allowed; None before."""
        since, what = self._last
        idle_s = self._clock() - since
        if idle_s <= self._limit_s:
            return None
        return RoleFailed(
            f"no step, fetch or save for {idle_s:.0f} s (orchestration.stall_timeout_s is {self._limit_s:g}); the last "
            f"progress was: {what}; the log has the stacks of all threads",
            "stalled",
        )


class Watchdog:
    """A thread that ends the process when nothing was noted for `limit_s` seconds, while the context is open.

    `on_stall` is given the failure, to leave word of it; `leave` ends the process.
    """

    def __init__(
        self,
        who: str,
        limit_s: float,
        *,
        on_stall: Callable[[DraftlineError], object],
        leave: Callable[[], object] = lambda: os._exit(1),
        look_s: float = _LOOK_S,
        last_words_s: float = _LAST_WORDS_S,
    ) -> None:
        self._who = who
        self._watch = Watch(limit_s)
        self._on_stall = on_stall
        self._leave = leave
        self._look_s = min(look_s, limit_s / 4)
        self._last_words_s = last_words_s
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="draftline-watchdog", daemon=True)

    def note(self, what: str) -> None:
        """See `Watch.note`."""
        self._watch.note(what)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed.wait(self._look_s):
            failure = self._watch.overdue()
            if failure is not None:
                _log.error("%s hangs: %s", self._who, failure)
                show_stacks()
                if self._closed.wait(self._last_words_s):
                    return  # it was slow, not hung: the work came to its end meanwhile
                self._on_stall(failure)
                sys.stderr.flush()
                self._leave()
                return


def show_stacks() -> None:
    """Write the stacks of all threads to the log, with those of native code where py-spy is installed."""
    faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
    if (py_spy := shutil.which("py-spy")) is not None:
        with_native = [py_spy, "dump", "--native", "--pid", str(os.getpid())]
        try:
            found = subprocess.run(with_native, capture_output=True, timeout=_PY_SPY_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            _log.warning("py-spy did not show the native stacks: %s", error)
            return
        _log.error("%s", (found.stdout or found.stderr).decode(errors="replace"))
