"""Waiting in tests: on a condition, within a bound that a loaded machine with a slow disk keeps too."""

from __future__ import annotations

import faulthandler
import sys
from collections.abc import Callable
from typing import TypeVar

import pytest

from disagg_core.processes.retry import wait_until

T = TypeVar("T")

PATIENCE_S = 120.0
"""What anything may take. A condition that comes true ends the wait at once, so a longer bound costs nothing."""


def eventually(
    condition: Callable[[], T],
    otherwise: str | Callable[[], str] = "the condition",
    *,
    within_s: float = PATIENCE_S,
    every_s: float = 0.02,
    alive: Callable[[], object] | None = None,
) -> T:
    """Return the first true answer of `condition`; fail with `otherwise` if there is none within `within_s` seconds.

    `otherwise` names what was waited for, or reads it: a log. `alive` is asked between two looks: a process that is to
    bring the condition about and ends before it fails the test at once. A failure shows what each thread is doing.
    """

    def fail(reason: str) -> None:
        pytest.fail(f"{reason}: {otherwise if isinstance(otherwise, str) else otherwise()}")

    def check() -> None:
        if alive is not None and not alive() and not condition():
            fail("it ended before")

    answer = wait_until(condition, timeout_s=within_s, every_s=every_s, on_wait=check)
    if not answer:
        faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        fail(f"not within {within_s:g} s")
    return answer
