"""The bounded waits: what they return, when they look, and what ends them sooner."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from disagg_core.errors import ChannelUnavailable, Preempted
from disagg_core.processes.retry import Retry, Tries, join_all, wait_until

pytestmark = pytest.mark.unit


class Nap:
    """A pause that is only written down."""

    def __init__(self) -> None:
        self.pauses: list[float] = []

    def __call__(self, seconds: float) -> None:
        self.pauses.append(seconds)


def test_what_is_so_already_is_not_waited_for() -> None:
    nap = Nap()

    assert wait_until(lambda: "there", timeout_s=60.0, every_s=1.0, sleep=nap) == "there"
    assert nap.pauses == []


def test_a_wait_returns_the_first_true_answer() -> None:
    answers = iter(["", "", "there"])
    nap = Nap()

    assert wait_until(lambda: next(answers), timeout_s=60.0, every_s=1.0, sleep=nap) == "there"
    assert nap.pauses == [1.0, 1.0]


def test_pauses_double_up_to_the_longest() -> None:
    answers = iter([0, 0, 0, 0, 0, 7])
    nap = Nap()

    assert wait_until(lambda: next(answers), timeout_s=60.0, every_s=1.0, longest_s=4.0, sleep=nap) == 7
    assert nap.pauses == [1.0, 2.0, 4.0, 4.0, 4.0]


def test_a_spent_budget_gives_the_last_untrue_answer_after_a_last_look() -> None:
    looks: list[float] = []

    def look() -> None:
        looks.append(time.monotonic())

    assert wait_until(look, timeout_s=2.0, every_s=1.2) is None  # far apart: a busy machine must not skip a look
    assert len(looks) == 3
    assert looks[-1] - looks[0] >= 2.0


def test_without_any_time_there_is_one_look() -> None:
    looks: list[int] = []

    wait_until(lambda: looks.append(1), timeout_s=0.0, every_s=1.0)

    assert looks == [1]


def test_a_request_to_stop_ends_a_wait_after_one_pause() -> None:
    nap = Nap()

    def check() -> None:
        raise Preempted("asked to stop")

    with pytest.raises(Preempted):
        wait_until(lambda: False, timeout_s=600.0, every_s=1.0, on_wait=check, sleep=nap)
    assert nap.pauses == [1.0]


def test_an_event_wakes_a_wait_that_sleeps_on_it() -> None:
    closing = threading.Event()
    timer = threading.Timer(0.05, closing.set)
    timer.start()

    assert wait_until(closing.is_set, timeout_s=250.0, every_s=200.0, sleep=closing.wait)
    timer.join()


def away() -> None:
    raise ChannelUnavailable("the mount is away")


def test_an_error_that_outlives_its_budget_says_what_the_budget_was() -> None:
    now = [0.0]

    def pause(seconds: float) -> None:
        now[0] += seconds

    retry = Retry(ChannelUnavailable, budget_s=2.0, every_s=1.0, sleep=pause, clock=lambda: now[0])

    with pytest.raises(ChannelUnavailable, match="the mount is away") as caught:
        retry(away)
    assert caught.value.__notes__ == ["tried 3 times; the budget of 2 s is spent"]


def test_an_awaited_call_is_tried_again_while_the_predicate_says_so() -> None:
    failures = iter([ConnectionError("refused"), ConnectionError("refused"), ValueError("wrong")])

    async def call() -> None:
        raise next(failures)

    retry = Retry(lambda error: isinstance(error, ConnectionError), budget_s=60.0, every_s=0.001)
    with pytest.raises(ValueError, match="wrong"):
        asyncio.run(retry.of(call))
    assert not list(failures)


def test_every_kind_of_trouble_has_a_budget_of_its_own_from_the_try_that_met_it() -> None:
    tries = Tries({"full": 0.0, "away": 60.0}, began=time.monotonic(), every_s=0.001, longest_s=0.002)

    assert not tries.allows("full")
    assert tries.allows("away")
    assert [tries.pause() for _ in range(3)] == [0.001, 0.002, 0.002]
    assert tries.allows("away")


def test_a_first_try_that_took_its_whole_budget_is_the_last() -> None:
    tries = Tries({"away": 5.0}, began=time.monotonic() - 6.0, every_s=0.001, longest_s=0.002)

    assert not tries.allows("away")


def test_threads_that_do_not_end_in_time_are_returned() -> None:
    release = threading.Event()
    ending, hanging = threading.Thread(target=lambda: None), threading.Thread(target=release.wait)
    never_started = threading.Thread(target=lambda: None)
    ending.start()
    hanging.start()

    assert join_all([ending, hanging, never_started], 0.05) == [hanging]
    release.set()
    assert join_all([ending, hanging], 60.0) == []
