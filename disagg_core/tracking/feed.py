"""Telling an observer what a run has written, from where an earlier process of the run left off.

Whatever goes wrong is noted and tried again; how far the files were told is written down after every part.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
from pydantic import BaseModel, Field, TypeAdapter

from disagg_core.files import write_atomically
from disagg_core.tracking.observer import NO_FIGURES, Decided, Evaluated, Event, RunObserver, TrackedRun

POLL_S = 2.0
"""How often the files are looked at."""
RETRY_S = 10.0
"""How long an observer that failed is left alone."""
LAST_S = 30.0
"""How long a tracker may take for what is left at the end of a run."""
_BATCH = 500
"""Lines that are read and told at a time."""
_EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="event")])
log = logging.getLogger(__name__)


class FeedState(BaseModel):
    """How far a tracker was told, as bytes of each file, and what keeps it from more: the last failure, or None."""

    positions: dict[str, int] = {}
    problem: str | None = None

    @classmethod
    def read(cls, path: Path) -> FeedState:
        """Return the state in `path`, a fresh one if there is none."""
        return cls.model_validate_json(path.read_bytes()) if path.is_file() else cls()


class Feed:
    """Tells one observer of one run; keeps its state in `state`, and reads events from `events`."""

    def __init__(self, run: TrackedRun, make: Callable[[], RunObserver], *, events: Path, state: Path) -> None:
        self._run, self._make, self._events, self._path = run, make, events, state
        self._state = FeedState.read(state)
        self._observer: RunObserver | None = None

    def follow(self, ended: Callable[[float], bool], *, last_s: float) -> None:
        """Tell the observer what is written until `ended` (which waits so many seconds for the end) says True.

        What is there then is told too; a failing observer is asked again for `last_s` seconds.
        """
        pause, deadline = 0.0, float("inf")
        while True:
            last = ended(pause)
            if last:
                deadline = min(deadline, time.monotonic() + last_s)
            told = self._told(closing=last)
            if last and (told or time.monotonic() > deadline):
                return
            pause = POLL_S if told else RETRY_S
            if last:
                time.sleep(POLL_S)

    def _told(self, *, closing: bool) -> bool:
        """Tell what is new and return True; note why that failed, and return False."""
        try:
            if self._observer is None:
                observer = self._make()
                observer.started(self._run)
                self._observer = observer
            self._tell(self._observer)
            if closing:
                self._observer.close()
        except Exception as error:  # the client of each tracker has errors of its own
            log.warning("the tracker could not be told", exc_info=True)
            self._note(f"{type(error).__name__}: {error}")
            return False
        self._note(None)
        return True

    def _tell(self, observer: RunObserver) -> None:
        for drafts, prefix in ((self._run.drafts, ""), (self._run.heldout, "heldout/")):
            for draft, path in drafts.items():
                for end, lines in self._new_lines(path):
                    steps = [step for line in lines if (step := _step_of(line, prefix)) is not None]
                    if steps:
                        observer.steps(draft, steps)
                    self._reached(path, end)
        for end, lines in self._new_lines(self._events, batch=1):
            _tell_event(observer, _EVENT.validate_json(lines[0]))
            self._reached(self._events, end)

    def _new_lines(self, path: Path, batch: int = _BATCH) -> Iterator[tuple[int, list[bytes]]]:
        """Yield the whole lines of a file that were not told, some at a time, each with the position behind them."""
        if not path.is_file():
            return
        with path.open("rb") as file:
            position = file.seek(self._state.positions.get(str(path), 0))
            lines: list[bytes] = []
            for line in file:
                if not line.endswith(b"\n"):
                    break
                position += len(line)
                lines.append(line)
                if len(lines) == batch:
                    yield position, lines
                    lines = []
            if lines:
                yield position, lines

    def _reached(self, path: Path, position: int) -> None:
        self._state.positions[str(path)] = position
        self._save()

    def _note(self, problem: str | None) -> None:
        if problem != self._state.problem:
            self._state.problem = problem
            self._save()

    def _save(self) -> None:
        write_atomically(self._path, self._state.model_dump_json(indent=2))


def _tell_event(observer: RunObserver, event: Event) -> None:
    if isinstance(event, Evaluated):
        observer.evaluated(event.draft, event.figures)
    elif isinstance(event, Decided):
        observer.decided(event.gate, event.source)
    else:
        observer.finished(event.report)


def _step_of(line: bytes, prefix: str) -> dict[str, Any] | None:
    """Return the step that a line of a metrics file is, its figures named with `prefix`; None for a damaged one."""
    try:
        record = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    if not isinstance(record, dict) or "step" not in record:
        return None
    return {name if name in NO_FIGURES else prefix + name: value for name, value in record.items()}
