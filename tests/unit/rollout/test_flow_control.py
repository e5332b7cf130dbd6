"""Flow control never deadlocks, never overshoots by more than a batch, and refuses settings with which it would."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg_core.errors import BadInput
from disagg_core.rollout.flow_control import FlowControl
from disagg_core.run.watermarks import Watermarks
from tests.unit.channel.kit import FakeClock

pytestmark = pytest.mark.unit


def test_publishing_pauses_at_the_high_and_goes_on_at_the_low_watermark() -> None:
    clock = FakeClock()
    flow = FlowControl(Watermarks(window=2, high_refs=8, low_refs=3), clock)
    assert [flow.may_publish(n) for n in (0, 7, 8, 7, 4, 3, 7)] == [True, True, False, False, False, True, True]
    assert flow.pauses == 1


def test_bytes_pause_as_well_and_both_must_have_drained() -> None:
    marks = Watermarks(window=1, high_refs=10, low_refs=5, high_bytes=1000, low_bytes=400, max_sample_bytes=300)
    flow = FlowControl(marks)
    assert not flow.may_publish(2, 1000)
    assert not flow.may_publish(6, 300)
    assert not flow.may_publish(5, 401)
    assert flow.may_publish(5, 400)


def test_the_time_paused_is_measured() -> None:
    clock = FakeClock()
    flow = FlowControl(Watermarks(window=1, high_refs=2, low_refs=1), clock)
    flow.may_publish(2)
    clock.now += 5
    assert flow.paused_s == 5
    flow.may_publish(1)
    clock.now += 5
    assert flow.paused_s == 5


@pytest.mark.parametrize(
    ("marks", "numbers"),
    [
        ({"window": 32, "high_refs": 31}, ["31", "32"]),
        ({"window": 32, "high_refs": 64, "low_refs": 16}, ["16", "32"]),
        ({"window": 4, "high_refs": 8, "high_bytes": 399, "max_sample_bytes": 100}, ["399", "400"]),
        ({"window": 4, "high_refs": 8, "high_bytes": 900, "low_bytes": 1, "max_sample_bytes": 100}, ["found 1", "400"]),
        ({"window": 4, "high_refs": 8, "low_refs": 9}, ["9", "8"]),
        ({"window": 4, "high_refs": 8, "low_bytes": 9}, ["9 bytes"]),
        ({"window": 0, "high_refs": 8}, ["0"]),
    ],
)
def test_watermarks_below_a_window_are_refused_with_both_numbers(marks: dict[str, int], numbers: list[str]) -> None:
    with pytest.raises(BadInput) as raised:
        Watermarks(**marks)
    assert all(number in str(raised.value) for number in numbers)


def test_losing_count_is_an_error_and_not_the_end_of_backpressure() -> None:
    with pytest.raises(ValueError, match="cannot be negative"):
        FlowControl(Watermarks(window=1, high_refs=2)).may_publish(-1)


@st.composite
def settings_and_steps(draw: st.DrawFn) -> tuple[Watermarks, int, list[str]]:
    window = draw(st.integers(1, 12))
    largest = draw(st.integers(1, 50))
    high = window + draw(st.integers(0, 20))
    low = draw(st.one_of(st.none(), st.integers(window, high)))
    high_bytes = draw(st.one_of(st.none(), st.integers(window * largest, window * largest + 500)))
    marks = Watermarks(
        window=window,
        high_refs=high,
        low_refs=low,
        high_bytes=high_bytes,
        max_sample_bytes=largest if high_bytes else 0,
    )
    steps = draw(st.lists(st.sampled_from(["produce", "consume", "restart producer", "restart consumer"]), max_size=80))
    return marks, draw(st.integers(1, 6)), steps


@settings(max_examples=300, deadline=None)
@given(given_=settings_and_steps(), data=st.data())
def test_any_interleaving_keeps_the_bounds_and_never_deadlocks(
    given_: tuple[Watermarks, int, list[str]], data: st.DataObject
) -> None:
    marks, batch, steps = given_
    flow = FlowControl(marks, FakeClock())
    in_flight: list[int] = []  # sizes, oldest first
    largest = marks.max_sample_bytes or 1

    def produce() -> bool:
        if not flow.may_publish(len(in_flight), sum(in_flight)):
            return False
        in_flight.extend(data.draw(st.lists(st.integers(1, largest), min_size=batch, max_size=batch)))
        return True

    def consume() -> bool:
        if len(in_flight) < marks.window:
            return False  # an optimizer step needs a whole window
        del in_flight[: marks.window]
        return True

    for step in steps:
        if step == "produce":
            produce()
        elif step == "consume":
            consume()
        elif step == "restart producer":
            flow = FlowControl(marks, FakeClock())  # forgets whether it was paused; the counts come from the stream
        # a restarted consumer holds nothing but its cursor, which is the in-flight count itself
        assert len(in_flight) <= marks.high_refs + batch
        assert marks.high_bytes is None or sum(in_flight) <= marks.high_bytes + batch * largest
        assert flow.may_publish(len(in_flight), sum(in_flight)) or len(in_flight) >= marks.window, "deadlock"
    for _ in range(20):  # and both sides get on for ever
        assert produce() or consume()
