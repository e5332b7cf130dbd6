"""Circuit breakers: a server that fails is left alone, tried with one request, and taken back when it works."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_core.engines.servers.circuit import CircuitBreakers

pytestmark = pytest.mark.unit


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def breakers(names="ab", **options):
    clock = Clock()
    return CircuitBreakers(
        names, **{"concurrency": 2, "threshold": 2, "probation_s": 5.0, "clock": clock, **options}
    ), clock


def test_requests_go_to_the_least_busy_server_up_to_its_places():
    circuits, _ = breakers()
    assert sorted(circuits.acquire() for _ in range(4)) == ["a", "a", "b", "b"]
    assert circuits.acquire() is None


def test_a_server_that_failed_a_prompt_is_avoided_while_there_is_another():
    circuits, _ = breakers()
    assert {circuits.acquire(avoid={"a"}) for _ in range(2)} == {"b"}
    assert circuits.acquire(avoid={"a"}) is None, "b is busy, and the prompt waits for it"
    circuits.take_away("b", "gone")
    assert circuits.acquire(avoid={"a"}) == "a", "no other server is left"


def test_a_failing_server_is_taken_out_and_comes_back_by_a_single_request():
    circuits, clock = breakers()
    for _ in range(2):
        circuits.acquire(avoid={"b"})
        circuits.failed("a", "refused")
    assert {circuits.acquire() for _ in range(2)} == {"b"}
    assert circuits.acquire() is None
    clock.now = 5.0
    assert circuits.acquire() == "a"
    assert circuits.acquire() is None, "one request on probation"
    circuits.succeeded("a")
    assert [circuits.acquire() for _ in range(2)] == ["a", "a"]
    report = circuits.reports()[0]
    assert (report.state, report.failures, report.last_reason) == ("closed", 2, "refused")
    assert report.events == ("taken out for 5 s: refused", "works again")


def test_relapses_double_the_pause():
    circuits, clock = breakers("a", threshold=1)
    for pause in (5.0, 10.0, 20.0):
        circuits.acquire()
        circuits.failed("a", "timeout")
        assert not circuits.any_usable
        clock.now += pause - 0.1
        assert not circuits.any_usable
        clock.now += 0.1
        assert circuits.any_usable


@given(st.lists(st.sampled_from(["acquire", "ok", "bad", "wait"]), max_size=60))
def test_places_are_never_exceeded_and_never_leak(steps):
    circuits, clock = breakers("abc")
    out = []
    for step in steps:
        if step == "acquire":
            name = circuits.acquire()
            out += [name] if name else []
        elif step == "wait":
            clock.now += 3.0
        elif out:
            name = out.pop()
            circuits.succeeded(name) if step == "ok" else circuits.failed(name, "x")
        for report in circuits.reports():
            assert report.in_flight == out.count(report.name) <= 2


def test_a_busy_server_is_paused_and_gets_half_as_much_and_has_not_failed():
    circuits, clock = breakers("a", concurrency=8)
    assert [circuits.acquire() for _ in range(8)] == ["a"] * 8
    for _ in range(8):
        circuits.busy("a", "the writer is behind")
    assert circuits.acquire() is None, "it is paused"
    assert circuits.any_usable, "the target is not away"
    clock.now += 0.5
    assert [circuits.acquire() for _ in range(5)] == ["a"] * 4 + [None]
    (report,) = circuits.reports()
    assert (report.state, report.failures) == ("closed", 0)


def test_pauses_of_a_server_that_stays_busy_grow_and_it_gets_its_places_back_when_it_works():
    circuits, clock = breakers("a", concurrency=8)
    pauses = []
    assert circuits.acquire() == "a"
    for _ in range(6):
        circuits.busy("a", "full")
        began = clock.now
        while circuits.acquire() is None:
            clock.now += 0.25
        pauses.append(clock.now - began)
    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0]
    for _ in range(60):
        circuits.succeeded("a")
        assert circuits.acquire() == "a"
    assert [circuits.acquire() for _ in range(8)] == ["a"] * 7 + [None]
