"""Every bounded wait of the project: look until something is so, or call again what may succeed a little later.

Three words, each with its time budget in its arguments. `wait_until` looks at a condition. `Retry` calls again what
raised a transient error. `Tries` is for a loop that decides by the answers it gets, with a budget for each kind of
trouble. `join_all` ends threads. The first two run on tenacity.

A request to stop must end any of them within one pause: hand over an `on_wait` that raises, or a `sleep` that wakes up
(an event's or a condition's ``wait``) beside a condition that notices.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Generic, ParamSpec, TypeVar

import tenacity
from tenacity.stop import stop_base
from tenacity.wait import wait_base

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
K = TypeVar("K")


def _nothing() -> None:
    return None


def wait_until(
    condition: Callable[[], T],
    *,
    timeout_s: float,
    every_s: float,
    longest_s: float | None = None,
    on_wait: Callable[[], object] = _nothing,
    sleep: Callable[[float], object] = time.sleep,
) -> T:
    """Return the first true answer of `condition`, or its last, untrue one after `timeout_s` seconds.

    Looks at once, then every `every_s` seconds (or after pauses that double up to `longest_s`), and a last time at the
    end. `on_wait` is called after each pause; it may report progress, and raises what is to end the wait sooner.
    """
    pauses = _pauses(every_s, longest_s)
    looking = tenacity.Retrying(
        retry=tenacity.retry_if_result(lambda answer: not answer),
        stop=tenacity.stop_after_delay(timeout_s),
        wait=lambda state: min(pauses(state), max(0.0, timeout_s - (state.seconds_since_start or 0.0))),
        sleep=_then(sleep, on_wait),
        retry_error_callback=_last_answer,
    )
    return looking(condition)


class Retry:
    """Calls again what raises a transient error, for up to `budget_s` seconds after the first failure of each call.

    Args:
        on: the errors that are waited out: their classes, or a function that tells.
        budget_s: after that the error goes on to the caller, with a note of how long it was tried.
        every_s: the pause between two tries.
        longest_s: pauses double up to this; without it they stay the same.
        what: who is away; named in a warning at the first failure of a call. Nothing is logged without it.
        on_wait: called after each pause; raises what is to end the retries sooner.
        sleep: makes the pause.
        clock: a monotonic clock.
    """

    def __init__(
        self,
        on: type[Exception] | tuple[type[Exception], ...] | Callable[[BaseException], bool],
        *,
        budget_s: float,
        every_s: float,
        longest_s: float | None = None,
        what: str | None = None,
        on_wait: Callable[[], object] = _nothing,
        sleep: Callable[[float], object] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if isinstance(on, (type, tuple)):
            self._on: tenacity.retry_if_exception = tenacity.retry_if_exception_type(on)
        else:
            self._on = tenacity.retry_if_exception(on)
        self._budget_s = budget_s
        self._pauses = _pauses(every_s, longest_s)
        self._what = what
        self._on_wait = on_wait
        self._sleep = sleep
        self._clock = clock

    def __call__(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what `call` returns, once it does.

        Raises:
            Exception: the error of the last try, when the budget is spent; any other error at once.
        """
        budget = self._budget()
        trying = tenacity.Retrying(sleep=_then(self._sleep, self._on_wait), **self._options(budget))
        return trying(call, *args, **kwargs)

    async def of(self, call: Callable[[], Awaitable[T]]) -> T:
        """Await `call()`, again and again, as `__call__` does; the pauses are asyncio's."""

        async def awaited() -> T:  # a plain function that returns an awaitable would not be awaited by tenacity
            return await call()

        trying = tenacity.AsyncRetrying(sleep=_pause_and(self._on_wait), **self._options(self._budget()))
        return await trying(awaited)

    def _budget(self) -> _Budget:
        return _Budget(self._budget_s, self._clock, self._what)

    def _options(self, budget: _Budget) -> dict[str, Any]:
        return {
            "retry": self._on,
            "stop": budget,
            "wait": self._pauses,
            "retry_error_callback": budget.give_up,
        }


class Tries(Generic[K]):
    """May there be another try? One time budget for each kind of trouble, and pauses that double.

    A budget counts from the beginning of the first try that met its kind of trouble: a call on a paused process takes
    many seconds to fail.

    Args:
        budget_s: seconds for each kind of trouble.
        began: when the first try began, on `time.monotonic`.
        every_s: the first pause.
        longest_s: the longest one.
        on_wait: called after each pause; raises what is to end the tries sooner.
    """

    def __init__(
        self,
        budget_s: Mapping[K, float],
        *,
        began: float,
        every_s: float,
        longest_s: float,
        on_wait: Callable[[], object] = _nothing,
    ) -> None:
        self._budget_s = budget_s
        self._since: dict[K, float] = {}
        self._try_began = began
        self._pause_s = every_s
        self._longest_s = longest_s
        self._on_wait = on_wait

    def allows(self, trouble: K) -> bool:
        """Tell whether there is time for another try after trouble of this kind."""
        return time.monotonic() - self._since.setdefault(trouble, self._try_began) < self._budget_s[trouble]

    def pause(self) -> float:
        """Wait before the next try; return the seconds waited."""
        waited = self._pause_s
        time.sleep(waited)
        self._on_wait()
        self._pause_s = min(2 * waited, self._longest_s)
        self._try_began = time.monotonic()
        return waited


def join_all(threads: Iterable[threading.Thread], timeout_s: float) -> list[threading.Thread]:
    """Wait up to `timeout_s` seconds for all of `threads` together; return those that are still alive."""
    deadline = time.monotonic() + timeout_s
    started = [thread for thread in threads if thread.ident is not None]
    for thread in started:
        thread.join(max(0.0, deadline - time.monotonic()))
    return [thread for thread in started if thread.is_alive()]


class _Budget(stop_base):
    """The time of one call of `Retry`, which begins with its first failure."""

    def __init__(self, budget_s: float, clock: Callable[[], float], what: str | None) -> None:
        self._budget_s = budget_s
        self._clock = clock
        self._what = what
        self._since: float | None = None

    def __call__(self, retry_state: tenacity.RetryCallState) -> bool:
        now = self._clock()
        if self._since is None:
            self._since = now
            if self._what is not None:
                error = None if retry_state.outcome is None else retry_state.outcome.exception()
                log.warning("%s is away, trying again for up to %g s: %s", self._what, self._budget_s, error)
        return now - self._since >= self._budget_s

    def give_up(self, state: tenacity.RetryCallState) -> Any:
        """Raise the last error, with a note of the budget that is spent."""
        assert state.outcome is not None
        error = state.outcome.exception()
        assert error is not None
        error.add_note(f"tried {state.attempt_number} times; the budget of {self._budget_s:g} s is spent")
        raise error


def _pauses(every_s: float, longest_s: float | None) -> wait_base:
    if longest_s is None:
        return tenacity.wait_fixed(every_s)
    return tenacity.wait_exponential(multiplier=every_s, max=longest_s)


def _then(sleep: Callable[[float], object], on_wait: Callable[[], object]) -> Callable[[float], None]:
    def pause(seconds: float) -> None:
        sleep(seconds)
        on_wait()

    return pause


def _pause_and(on_wait: Callable[[], object]) -> Callable[[float], Awaitable[None]]:
    async def pause(seconds: float) -> None:
        await asyncio.sleep(seconds)
        on_wait()

    return pause


def _last_answer(state: tenacity.RetryCallState) -> Any:
    assert state.outcome is not None
    return state.outcome.result()
