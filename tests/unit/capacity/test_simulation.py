"""The model of the pipeline beside a simulation that the real flow control drives."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg_core.capacity.simulation import Scene, Simulation
from disagg_core.run.watermarks import Watermarks

pytestmark = pytest.mark.unit


def a_scene(**changes: object) -> Scene:
    """Four captures at a time of 0.4 s each, windows of 8 samples in 0.8 s: both sides do ten samples a second."""
    scene = {
        "slots": 4,
        "capture_s": 0.4,
        "put_s": 0.001,
        "get_s": 0.001,
        "fixed_step_s": 0.0,
        "sample_step_s": 0.1,
        "sample_bytes": 1000,
        "marks": Watermarks(window=8, high_refs=256),
        "prefetch_samples": 64,
    }
    return Scene(**{**scene, **changes})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"capture_s": 0.8}, 5.0),
        ({"sample_step_s": 0.3}, 10 / 3),
        ({"fixed_step_s": 0.8}, 5.0),
        ({"put_s": 0.2}, 5.0),
        ({"get_s": 0.25}, 4.0),
        ({"slots": 64, "capture_s": 12.8, "ordered": False}, 5.0),
        ({"capture_s": 0.8, "ordered": False}, 5.0),
        ({"sample_step_s": 0.3, "spread": 1.2}, 10 / 3),
    ],
    ids=["capture", "training", "reduction", "put", "get", "many slots", "as they complete", "very unlike lengths"],
)
def test_the_pipeline_has_the_rate_of_its_slowest_stage(changes: dict[str, object], expected: float) -> None:
    found = Simulation(a_scene(**changes), samples=4000).run()
    assert found.samples_per_s == pytest.approx(expected, rel=0.06)


def test_the_side_that_waits_is_the_faster_one() -> None:
    slow_capture = Simulation(a_scene(capture_s=0.8), samples=2000).run()
    assert slow_capture.refs == pytest.approx(0.5, abs=0.05)
    assert slow_capture.space == 0.0
    slow_training = Simulation(a_scene(sample_step_s=0.2), samples=2000).run()
    assert slow_training.space == pytest.approx(0.5, abs=0.05)
    assert slow_training.refs == pytest.approx(0.0, abs=0.01)
    slow_store = Simulation(a_scene(get_s=0.2), samples=2000).run()
    assert slow_store.features > 0.4


def test_sides_of_equal_speed_lose_little_with_room_for_some_windows_and_much_without() -> None:
    roomy = Simulation(a_scene(), samples=4000).run()
    tight = Simulation(a_scene(marks=Watermarks(window=8, high_refs=12, low_refs=8)), samples=4000).run()
    assert roomy.samples_per_s >= 0.95 * 10
    assert tight.samples_per_s < 0.9 * roomy.samples_per_s


def test_publishing_in_order_costs_where_many_captures_wait_for_a_long_one_under_a_low_watermark() -> None:
    """A capture that takes five times as long as the others holds back all that came after it, and their space."""
    many = {"slots": 64, "capture_s": 12.8, "sample_step_s": 0.01, "spread": 0.8}
    low = {"marks": Watermarks(window=8, high_refs=80)}
    in_order = Simulation(a_scene(**many, **low), samples=4000).run()
    as_they_complete = Simulation(a_scene(**many, **low, ordered=False), samples=4000).run()
    more_room = Simulation(a_scene(**many, marks=Watermarks(window=8, high_refs=512)), samples=4000).run()
    assert in_order.samples_per_s < 0.5 * as_they_complete.samples_per_s
    assert more_room.samples_per_s > 2 * in_order.samples_per_s


@settings(max_examples=40, deadline=None)
@given(
    window=st.integers(1, 16),
    room=st.integers(0, 40),
    slots=st.integers(1, 20),
    group=st.integers(1, 8),
    by_bytes=st.booleans(),
    ordered=st.booleans(),
    seed=st.integers(0, 100),
)
def test_the_flow_control_keeps_its_bounds_and_lets_everything_through(
    window: int, room: int, slots: int, group: int, by_bytes: bool, ordered: bool, seed: int
) -> None:
    high, largest = window + room, 3000
    marks = Watermarks(
        window=window,
        high_refs=high,
        high_bytes=(window + room // 2) * largest if by_bytes else None,
        max_sample_bytes=largest if by_bytes else 0,
    )
    scene = a_scene(marks=marks, slots=slots, group=group, ordered=ordered)
    found = Simulation(scene, samples=window * 20, seed=seed).run()
    assert found.most_refs <= high
    assert marks.high_bytes is None or found.most_bytes <= marks.high_bytes
