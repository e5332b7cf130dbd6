"""The transfer memory of a client that talks to a real store: as much as was planned, and none when it is idle."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from disagg_core.contracts import RunIdentity
from disagg_core.store import MooncakeFeatureStore, memory, staging
from disagg_core.store.capacity import staging_bytes_for
from tests.integration.store.test_put_get import assert_same
from tests.kit.waiting import eventually

pytestmark = pytest.mark.integration

Open = Callable[..., MooncakeFeatureStore]
MIB = 1 << 20


def sample_of(nbytes: int) -> dict[str, torch.Tensor]:
    return {"x": torch.randint(0, 256, (nbytes,), dtype=torch.uint8)}


def round_trip(store: MooncakeFeatureStore, identity: RunIdentity, number: int, nbytes: int) -> None:
    sample = sample_of(nbytes)
    ref = store.put(f"s{number:09d}", sample, identity=identity, source_task_id="t", num_tokens=1)
    assert_same(store.get(ref), sample)
    store.release(ref)


def test_samples_that_get_longer_and_longer_stay_within_the_plan(open_store: Open, identity: RunIdentity) -> None:
    planned = staging_bytes_for(20 * MIB)
    store = open_store(staging_bytes=planned)
    for number, nbytes in enumerate(range(MIB, 20 * MIB, 3 * MIB - 77)):
        round_trip(store, identity, number, nbytes)
        assert store.counters["staging_bytes"] <= 2 * planned


def test_without_a_plan_the_memory_grows_with_the_samples_and_leaves_none_behind(
    open_store: Open, identity: RunIdentity
) -> None:
    store = open_store(staging_bytes=2 * MIB)
    for number, nbytes in enumerate(range(MIB, 20 * MIB, 3 * MIB - 77)):
        round_trip(store, identity, number, nbytes)
        assert store.counters["staging_bytes"] <= 4 * MIB + 2 * (5 * nbytes // 4 + staging.HUGE_PAGE)


def test_a_client_that_rests_gives_its_memory_back(
    open_store: Open, identity: RunIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(staging, "IDLE_S", 0.2)
    store = open_store()
    for number in range(2):
        round_trip(store, identity, number, 3 * MIB)
        assert store.counters["staging_bytes"] > 0
        eventually(lambda: store.counters["staging_bytes"] == 0)


def test_memory_comes_and_goes_beside_transfers(
    open_store: Open, identity: RunIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "LOOK_EVERY_S", 0.002)
    monkeypatch.setattr(staging, "IDLE_S", 0.0)
    store = open_store(staging_bytes=2 * MIB)
    sizes = [(1 + 13 * number % 31) * MIB // 8 for number in range(60)]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda at: round_trip(store, identity, at, sizes[at]), range(len(sizes))))
