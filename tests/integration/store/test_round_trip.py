"""The probe that a store passes before a run: it notices what is wrong and leaves nothing."""

from collections.abc import Callable
from typing import Any

import pytest

from disagg_core.errors import SampleLost, StoreUnavailable
from disagg_core.store import MooncakeFeatureStore, round_trip
from tests.integration.store.test_faults import answer, damage

pytestmark = pytest.mark.integration

Open = Callable[..., MooncakeFeatureStore]


def test_a_sound_store_passes_and_keeps_nothing(store: MooncakeFeatureStore) -> None:
    assert round_trip(store) > 0
    assert round_trip(store) > 0
    assert store.key_count() == 0


@pytest.mark.parametrize("checksum", [True, False])
def test_a_store_that_damages_samples_does_not_pass(open_store: Open, faults: Any, checksum: bool) -> None:
    store = open_store(wrap=faults.wrap, checksum=checksum)
    faults.on("get_into", *[damage] * 9)
    with pytest.raises(SampleLost, match=r"damaged|came back changed"):
        round_trip(store)
    assert store.key_count() == 0


def test_a_store_that_does_not_answer_does_not_pass(open_store: Open, faults: Any) -> None:
    store = open_store(wrap=faults.wrap, retry_timeout_s=0.1)
    faults.on("put_from", *[answer(-900)] * 99)
    with pytest.raises(StoreUnavailable):
        round_trip(store)


def test_a_store_that_keeps_what_was_removed_does_not_pass(open_store: Open, faults: Any) -> None:
    store = open_store(wrap=faults.wrap)
    faults.on("remove", answer(0))
    with pytest.raises(SampleLost, match="expected the sample to be gone"):
        round_trip(store)
    store.sweep()
