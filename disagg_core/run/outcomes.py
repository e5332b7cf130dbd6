"""How a role ended, as a file that outlives its process: what the parent decides the attempt by.

A role that was killed leaves no outcome; its watcher then writes one that says it `died`. Where the watcher was killed
too there is none at all.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, JsonValue

from disagg_core.errors import DraftlineError, FailureClass, Preempted, classify
from disagg_core.files import write_atomically

PREEMPTED_EXIT_CODE = 75
"""Exit code of a process that was asked to stop and saved its state (EX_TEMPFAIL: try again later)."""


MAX_STEPS, EARLY_STOP = "max_steps", "early_stop"
"""Why a consumer that did its work took no further step, though there may be samples left: they are not used."""


class RoleOutcome(BaseModel):
    """The end of one role process. `result` holds the role's own figures; `died` that it left no word itself."""

    model_config = ConfigDict(frozen=True)

    state: Literal["completed", "failed"]
    failure_class: FailureClass | None = None
    message: str = ""
    died: bool = False
    started: float
    ended: float
    result: dict[str, JsonValue] = {}


def write_outcome(path: Path, started: float, result: dict[str, JsonValue] | None = None) -> None:
    """Record that the role which started at `started` (seconds since the epoch) finished its work."""
    outcome = RoleOutcome(state="completed", started=started, ended=time.time(), result=result or {})
    write_atomically(path, outcome.model_dump_json(indent=2))


def write_failure(path: Path, started: float, error: BaseException, *, died: bool = False) -> None:
    """Record that the role failed with `error`; `died` if that is what its watcher found."""
    outcome = RoleOutcome(
        state="failed",
        failure_class=classify(error),
        message=str(error) if died else f"{type(error).__name__}: {error}",
        died=died,
        started=started,
        ended=time.time(),
    )
    write_atomically(path, outcome.model_dump_json(indent=2))


def read_outcome(path: Path) -> RoleOutcome | None:
    """Return the outcome in `path`, or None if the role left none."""
    return RoleOutcome.model_validate_json(path.read_bytes()) if path.is_file() else None


def exit_code_of(role: Callable[[], object]) -> int:
    """Run `role` and return its process's exit code.

    0 when it finished, `PREEMPTED_EXIT_CODE` when it was asked to stop, 1 for another named failure. Anything else is
    a bug and leaves with its traceback.
    """
    try:
        role()
    except Preempted:
        return PREEMPTED_EXIT_CODE
    except DraftlineError:
        return 1
    return 0


def exit_with(role: Callable[[], object]) -> None:
    """Run `role` and end this process with its exit code, also where it left threads behind.

    A thread inside torch is a daemon that an ordinary exit would unwind through C++ frames: the process would abort,
    and a role that did all its work would count as one that died.
    """
    try:
        code = exit_code_of(role)
    except Exception:
        if not _left_behind():
            raise
        traceback.print_exc()
        code = 1
    if _left_behind():
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _left_behind() -> bool:
    return any(thread is not threading.main_thread() for thread in threading.enumerate())
