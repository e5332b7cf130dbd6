"""Ending a long computation or wait from outside: the thread that is in it asks whether to go on, wherever it may end.

Who starts the work says what is asked (`interruptible`); what runs deep inside, a decoding loop or a client's retries,
asks (`check_interrupt`) without knowing whose work it is part of. Each thread has questions of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar


def _go_on() -> None:
    return None


_asked: ContextVar[Callable[[], None]] = ContextVar("asked", default=_go_on)


@contextmanager
def interruptible(check: Callable[[], None]) -> Iterator[None]:
    """Let `check`, which raises what is to end the work, be asked by all that this thread does inside."""
    token = _asked.set(check)
    try:
        yield
    finally:
        _asked.reset(token)


def check_interrupt() -> None:
    """Raise what the work of this thread is to end with; return at once if it may go on."""
    _asked.get()()
