"""The error table: every code of the design has its verdict and its named error."""

import pytest

from disagg_core.errors import SampleLost, StoreError, StoreFull, StoreRejected, StoreUnavailable, Transient
from disagg_core.store.codes import Verdict, error_from_code, is_settled, verdict_of

pytestmark = pytest.mark.unit

TABLE = {
    Verdict.FULL: (StoreFull, [-200, -1700]),
    Verdict.LOST: (SampleLost, [-704, -710, -712]),
    Verdict.TRANSIENT: (StoreUnavailable, [-703, -707, -800, -801, -900, -901, -101]),
    Verdict.BUG: (StoreRejected, [-1, -600, -705, -12345]),
}


@pytest.mark.parametrize(("verdict", "error", "code"), [(v, e, c) for v, (e, codes) in TABLE.items() for c in codes])
def test_each_code_has_one_meaning(verdict: Verdict, error: type[StoreError], code: int) -> None:
    assert verdict_of(code) is verdict
    raised = error_from_code(code, operation="put", key="run/1/s1/k", note="7 of 8 bytes used")
    assert type(raised) is error
    for part in (str(code), "run/1/s1/k", "put", "7 of 8 bytes used"):
        assert part in str(raised)
    assert isinstance(raised, Transient) == (verdict is Verdict.TRANSIENT)


def test_counts_are_success() -> None:
    assert verdict_of(0) is Verdict.DONE
    assert verdict_of(4096) is Verdict.DONE


@pytest.mark.parametrize(("code", "settled"), [(0, True), (-704, True), (-901, True), (-800, False), (-1, False)])
def test_a_failed_transfer_may_still_be_running(code: int, settled: bool) -> None:
    assert is_settled(code) is settled
