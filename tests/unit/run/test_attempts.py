"""After each attempt: is there a next one?"""

from __future__ import annotations

import pytest

from disagg_core.errors import AccountingError, ChannelDamaged, RoleFailed
from disagg_core.report.accounting import Accounting
from disagg_core.run.attempts import RETRIED, AttemptLoop, AttemptOutcome

pytestmark = pytest.mark.unit


def test_a_clean_attempt_is_the_only_one() -> None:
    loop = AttemptLoop(limit=3)
    assert loop.next() == 1
    loop.record(AttemptOutcome(attempt=1))
    assert loop.next() is None


def test_a_lost_store_is_worth_another_attempt_until_they_are_used_up() -> None:
    loop = AttemptLoop(limit=2, first=4)
    assert loop.next() == 4
    loop.record(AttemptOutcome(attempt=4, failure_class="store_lost", reason="owner died"))
    assert loop.next() == 5
    loop.record(AttemptOutcome(attempt=5, failure_class="store_lost", reason="owner died"))
    with pytest.raises(RoleFailed, match=r"attempt 5 failed, store_lost: owner died; run\.attempts allows 2") as end:
        loop.next()
    assert end.value.failure_class == "store_lost"


@pytest.mark.parametrize("failure_class", ["bug", "bad_input"])
def test_what_would_only_fail_again_is_not_retried(failure_class: str) -> None:
    loop = AttemptLoop(limit=9)
    loop.record(AttemptOutcome(attempt=1, failure_class=failure_class, reason="no"))
    with pytest.raises(RoleFailed, match="no"):
        loop.next()


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
