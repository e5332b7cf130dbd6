"""Where the time of a step goes: phases without a remainder, read when the device has passed them."""

import pytest

from disagg_core.run.phases import RecentShares, shares_of
from disagg_core.training.phase_clock import ClockMarks, PhaseClock

pytestmark = pytest.mark.unit


class Device:
    """A device that is some way behind the host: a mark is passed when `reached` has come to it."""

    def __init__(self):
        self.host, self.reached = 0.0, 0.0

    def mark(self):
        return self.host

    def passed(self, mark):
        return mark <= self.reached

    def between(self, first, second):
        assert self.passed(second), "a mark was read that the device has not passed"
        return second - first


def test_every_moment_belongs_to_the_phase_that_was_entered_last():
    now = [0.0]
    clock = PhaseClock(marks=ClockMarks(lambda: now[0]))
    for at, phase in [(0.0, "refs"), (1.0, "features"), (1.5, "forward"), (3.5, "backward"), (4.0, "forward")]:
        now[0] = at
        clock.enter(phase)
    now[0] = 6.0
    clock.lap(1, samples=8)
    now[0] = 6.5
    clock.enter("refs")
    now[0] = 7.0
    clock.lap(2, samples=8)

    first, second = clock.finished()

    assert first.seconds == {"refs": 1.0, "features": 0.5, "forward": 4.0, "backward": 0.5}
    assert sum(first.seconds.values()) == 6.0
    assert second.seconds == {"forward": 0.5, "refs": 0.5}, "what runs at the end of a window goes on in the next one"
    assert list(clock.finished()) == []


def test_a_lap_is_read_when_the_device_has_passed_it_and_nobody_waits_for_that():
    device = Device()
    clock = PhaseClock(marks=device)
    for step in (1, 2, 3):
        clock.enter("refs")
        device.host += 1.0
        clock.enter("forward")
        device.host += 2.0
        clock.lap(step, samples=4)
        device.reached = device.host - 3.0

        assert [lap.step for lap in clock.finished()] == ([step - 1] if step > 1 else []), "one step late"


def test_what_came_before_the_first_window_belongs_to_no_step():
    now = [0.0]
    clock = PhaseClock(marks=ClockMarks(lambda: now[0]))
    clock.enter("refs")
    now[0] = 60.0
    clock.restart()
    now[0] = 61.0
    clock.lap(1, samples=1)
    (lap,) = clock.finished()
    assert lap.seconds == {"other": 1.0}


def test_shares_are_those_of_the_last_minutes():
    recent = RecentShares(window_s=10.0)
    for _ in range(20):
        recent.add({"refs": 1.0, "forward": 0.0}, samples=4)
    for _ in range(5):
        recent.add({"refs": 1.0, "forward": 3.0}, samples=4)
    assert shares_of(recent.sums()) == {"refs": 0.25, "forward": 0.75}
    assert recent.rate_without(("refs",)) == pytest.approx(4 / 3)
    assert recent.mean_s == 4.0
    assert recent.fields() == {"share_refs": 0.25, "share_forward": 0.75}
