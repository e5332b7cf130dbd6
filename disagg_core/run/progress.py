"""Progress of a role as one small JSON file, replaced atomically: what a watcher on the same mount reads."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from disagg_core.files import write_atomically

log = logging.getLogger(__name__)

ProgressValue = str | int | float | bool | None
_ENOUGH, _LONG_ENOUGH_S = 5, 10.0


def tells_pace(done: int, seconds: float) -> bool:
    """Whether `done` things in so many `seconds` say how fast they go: the first few, and the first seconds, do not."""
    return done >= _ENOUGH and seconds >= _LONG_ENOUGH_S


def figure_of(draft: str, name: str) -> str:
    """Return what the figure `name` of a draft is called in a progress file; `draft` is empty for an only one."""
    return f"{name} {draft}".strip()


class ProgressFile:
    """The latest state of one role. Writes at most once in `interval_s`; `flush` writes at once."""

    def __init__(self, path: Path, *, interval_s: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._interval_s = interval_s
        self._clock = clock
        self._fields: dict[str, ProgressValue] = {}
        self._written_at = float("-inf")

    def update(self, **fields: ProgressValue) -> None:
        """Merge `fields` into the state; write it if the last write is long enough ago."""
        self._fields.update(fields)
        if self._clock() - self._written_at >= self._interval_s:
            self.flush()

    def flush(self) -> None:
        """Write the state now; where the file system refuses it, a watcher sees the older one until the next time."""
        self._written_at = self._clock()
        try:
            write_atomically(self._path, msgspec.json.encode({**self._fields, "time": round(time.time(), 3)}))
        except OSError as error:
            log.warning("%s: the progress cannot be written: %s", self._path, error)


def read_progress(path: Path) -> dict[str, ProgressValue]:
    """Return the state in `path`, or an empty dict if nothing was written yet."""
    if not path.is_file():
        return {}
    state: dict[str, ProgressValue] = msgspec.json.decode(path.read_bytes())
    return state
