"""How long the producer waits for a channel that is away, with a clock of its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from disagg_core.errors import ChannelBusy, ChannelUnavailable, Preempted
from disagg_core.processes.retry import Retry

pytestmark = pytest.mark.unit


class World:
    """A clock that moves when somebody waits, and a channel that is away until a given time."""

    def __init__(self, back_at: float) -> None:
        self.now = 0.0
        self.back_at = back_at
        self.calls = 0

    def wait(self, seconds: float) -> None:
        self.now += seconds

    def call(self, answer: str) -> str:
        self.calls += 1
        if self.now < self.back_at:
            raise ChannelUnavailable("the mount is away")
        return answer

    def retry(self, check: Callable[[], None] = lambda: None) -> Retry:
        return Retry(
            ChannelUnavailable,
            budget_s=60.0,
            every_s=0.25,
            on_wait=check,
            sleep=self.wait,
            clock=lambda: self.now,
        )


def test_a_channel_that_is_back_in_time_answers() -> None:
    world = World(back_at=59.0)
    patiently = world.retry()

    assert patiently(world.call, "yes") == "yes"
    assert patiently(world.call, answer="again") == "again"
    assert 59.0 <= world.now < 60.0


def test_every_call_has_the_whole_time() -> None:
    world = World(back_at=50.0)
    patiently = world.retry()
    patiently(world.call, "first")
    world.back_at = 100.0

    assert patiently(world.call, "second") == "second"


def test_a_channel_that_stays_away_is_given_up() -> None:
    world = World(back_at=1000.0)

    with pytest.raises(ChannelUnavailable, match="the mount is away"):
        world.retry()(world.call, "never")
    assert 60.0 <= world.now <= 61.0


def test_other_errors_are_not_waited_out() -> None:
    world = World(back_at=0.0)

    def busy() -> None:
        raise ChannelBusy("another writer")

    with pytest.raises(ChannelBusy):
        world.retry()(busy)
    assert world.now == 0.0


def test_a_request_to_stop_ends_the_waiting() -> None:
    world = World(back_at=1000.0)

    def check() -> None:
        if world.now >= 5.0:
            raise Preempted("asked to stop")

    with pytest.raises(Preempted):
        world.retry(check)(world.call, "never")
    assert world.now < 6.0
