"""After each attempt: is there a next one?"""

from __future__ import annotations

import pytest

from disagg_core.errors import AccountingError, ChannelDamaged, FailureClass, RoleFailed
from disagg_core.failures import POLICIES
from disagg_core.report.accounting import Accounting
from disagg_core.run.attempts import RETRIED, AttemptLoop, AttemptOutcome

pytestmark = pytest.mark.unit


def test_a_clean_attempt_is_the_only_one() -> None:
    loop = AttemptLoop(limit=3)
    assert loop.next() == 1
    loop.record(AttemptOutcome(attempt=1))
    assert loop.next() is None


def test_a_lost_store_is_worth_another_attempt_until_they_are_used_up() -> None:
    now = 0.0
    loop = AttemptLoop(limit=2, first=4, clock=lambda: now)
    assert loop.next() == 4
    loop.record(AttemptOutcome(attempt=4, failure_class="store_lost", reason="owner died"))
    assert loop.next() == 5
    now = 3600.0
    loop.record(AttemptOutcome(attempt=5, failure_class="store_lost", reason="owner died"))
    with pytest.raises(RoleFailed, match=r"attempt 5 failed, store_lost: owner died; run\.attempts allows 2") as end:
        loop.next()
    assert end.value.failure_class == "store_lost"


def test_bad_input_would_only_fail_again() -> None:
    loop = AttemptLoop(limit=9)
    loop.record(AttemptOutcome(attempt=1, failure_class="bad_input", reason="no"))
    with pytest.raises(RoleFailed, match="no"):
        loop.next()


@pytest.mark.parametrize("failure_class", ["bug", "out_of_memory", "diverged"])
def test_what_may_fail_again_is_tried_once_more_from_the_checkpoint_and_no_more(failure_class: FailureClass) -> None:
    loop = AttemptLoop(limit=9)
    loop.record(AttemptOutcome(attempt=1, failure_class=failure_class, reason="once"))
    assert loop.next() == 2
    loop.record(AttemptOutcome(attempt=2, failure_class=failure_class, reason="twice"))
    with pytest.raises(RoleFailed, match="twice") as end:
        loop.next()
    assert POLICIES[failure_class].way_out in str(end.value)


@pytest.mark.parametrize("failure_class", ["infrastructure", "store_lost", "target_unavailable"])
def test_an_outage_of_ten_minutes_uses_up_one_attempt(failure_class: FailureClass) -> None:
    now, back_at, reach_s = 0.0, 600.0, 30.0
    loop = AttemptLoop(limit=3, clock=lambda: now)
    attempts = 0
    while now < back_at:
        attempt = loop.next()
        assert attempt is not None
        attempts += 1
        now += loop.pause_s + reach_s
        if now < back_at:
            loop.record(AttemptOutcome(attempt, failure_class, "away"))
    assert attempts >= 4
    assert loop.used_up == 1
    now += 3 * 3600
    loop.record(AttemptOutcome(99, failure_class, "away again, hours later"))
    assert (loop.used_up, loop.next()) == (2, 100)


def test_one_outage_is_one_whatever_the_roles_called_it() -> None:
    now = 0.0
    loop = AttemptLoop(limit=2, clock=lambda: now)
    for number, failure_class in enumerate(("infrastructure", "store_lost", "infrastructure"), 1):
        loop.record(AttemptOutcome(number, failure_class, "the machine room"))
        now += 200
    assert loop.next() == 4


def test_an_outage_that_does_not_end_uses_the_attempts_up() -> None:
    now = 0.0
    loop = AttemptLoop(limit=3, clock=lambda: now)

    def go_on() -> None:
        nonlocal now
        for attempt in loop:
            now += loop.pause_s + 10
            assert now < 3 * 3600, "it goes on for ever"
            loop.record(AttemptOutcome(attempt, "infrastructure", "away"))

    with pytest.raises(RoleFailed, match=r"run\.attempts allows 3"):
        go_on()
    assert now > 1800


def test_pauses_grow_with_each_failure_of_a_kind_and_begin_anew_with_another() -> None:
    loop = AttemptLoop(limit=99)
    pauses = []
    for attempt in range(1, 8):
        loop.record(AttemptOutcome(attempt, "infrastructure", "away"))
        pauses.append(loop.pause_s)
    assert pauses == [15, 30, 60, 120, 240, 300, 300]
    loop.record(AttemptOutcome(8, "preempted", "asked to stop"))
    assert loop.pause_s == 2
    loop.record(AttemptOutcome(9, incomplete=1))
    assert loop.pause_s == 0


def test_a_damaged_channel_is_worth_another_attempt_with_a_new_one() -> None:
    assert ChannelDamaged("x").failure_class in RETRIED


def test_lost_samples_are_captured_again_in_another_attempt() -> None:
    loop = AttemptLoop(limit=2)
    loop.record(AttemptOutcome(attempt=1, incomplete=3))
    assert loop.next() == 2


def figures(**changes: int) -> Accounting:
    sound = {"prompts": 10, "rejected": 1, "published": 9, "trained": 8, "quarantined": 1, "store_keys_left": 0}
    return Accounting(**{**sound, **changes})


def test_a_sound_run_adds_up() -> None:
    figures().check()
    figures(trained=5, unused=3).check()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"prompts": 11}, r"11 != 9 \+ 1"),
        ({"trained": 7}, r"9 != 7 \+ 1 \+ 0"),
        ({"store_keys_left": 2}, "2 samples were left"),
        ({"trained": 12, "unused": -4}, "more samples .* than published, by 4"),
    ],
)
def test_a_missing_sample_is_an_error_with_its_numbers(change: dict[str, int], complaint: str) -> None:
    with pytest.raises(AccountingError, match=complaint):
        figures(**change).check()
