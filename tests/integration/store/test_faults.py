"""What the store does when the real Mooncake answers badly, damages bytes, or is full."""

import ctypes
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch

from disagg_core.contracts import RunIdentity, SampleRef
from disagg_core.errors import SampleLost, StoreFull, StoreMisuse, StoreRejected, StoreUnavailable
from disagg_core.store import MooncakeFeatureStore, NewSample, probe_store
from disagg_core.store.endpoints import StoreEndpoints
from tests.kit.waiting import eventually

pytestmark = pytest.mark.integration

Open = Callable[..., MooncakeFeatureStore]
SAMPLE = {"x": torch.arange(10_000), "y": torch.ones(7, dtype=torch.bfloat16)}


def answer(code: Any) -> Callable[..., Any]:
    """Do nothing and answer `code`."""
    return lambda real, *args: code


def deny(code: Any) -> Callable[..., Any]:
    """Do it and answer `code` all the same."""

    def fault(real: Callable[..., Any], *args: Any) -> Any:
        real(*args)
        return code

    return fault


def damage(real: Callable[..., Any], key: Any, address: Any, *rest: Any) -> Any:
    """Do it and flip a bit of what arrived."""
    code = real(key, address, *rest)
    target = address[1] if isinstance(address, list) else address
    byte = ctypes.c_ubyte.from_address(target + 100)
    byte.value ^= 4
    return code


def put(store: MooncakeFeatureStore, identity: RunIdentity, tensors: dict[str, torch.Tensor] = SAMPLE) -> SampleRef:
    return store.put("s000000001", tensors, identity=identity, source_task_id="t", num_tokens=1)


def assert_whole(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor] = SAMPLE) -> None:
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("code", [-900, -901, -800, -703, -101])
def test_a_put_that_fails_is_tried_again_under_a_new_key(
    open_store: Open, identity: RunIdentity, faults: Any, code: int
) -> None:
    store = open_store(wrap=faults.wrap)
    faults.on("put_from", answer(code))
    ref = put(store, identity)
    keys = [args[0] for method, args in faults.calls if method == "put_from"]
    assert len(set(keys)) == 2
    assert ref.key == keys[1]
    assert store.counters["put_retries"] == 1
    assert_whole(store.get(ref))
    store.release(ref)


def test_a_put_that_failed_but_was_done_leaves_nothing(open_store: Open, identity: RunIdentity, faults: Any) -> None:
    store = open_store(wrap=faults.wrap)
    faults.on("put_from", deny(-901), deny(-800))
    ref = put(store, identity)
    eventually(lambda: store.key_count() == 1)
    assert_whole(store.get(ref))
    store.release(ref)
    assert store.key_count() == 0


def test_a_put_whose_every_try_fails_names_the_trouble_and_leaves_nothing(
    open_store: Open, identity: RunIdentity, faults: Any
) -> None:
    store = open_store(wrap=faults.wrap, retry_timeout_s=0.3)
    faults.on("put_from", *[deny(-901)] * 100)
    begin = time.monotonic()
    with pytest.raises(StoreUnavailable, match=r"-901 \(RPC_TIMEOUT\).*tried for 0.3 s"):
        put(store, identity)
    assert time.monotonic() - begin < 30
    eventually(lambda: store.key_count() == 0)


def test_an_unknown_answer_is_a_bug_and_leaves_nothing(open_store: Open, identity: RunIdentity, faults: Any) -> None:
    store = open_store(wrap=faults.wrap)
    faults.on("put_from", deny(-4711))
    with pytest.raises(StoreRejected, match="-4711"):
        put(store, identity)
    eventually(lambda: store.key_count() == 0)


def test_damage_on_the_way_is_found_and_read_again(open_store: Open, identity: RunIdentity, faults: Any) -> None:
    store = open_store(wrap=faults.wrap)
    ref = put(store, identity)
    faults.on("get_into", damage, damage)
    assert_whole(store.get(ref))
    assert store.counters["damaged_reads"] == 2
    assert store.counters["samples_lost"] == 0
    store.release(ref)


def test_a_sample_damaged_for_good_is_lost(open_store: Open, identity: RunIdentity) -> None:
    store = open_store()
    ref = put(store, identity)
    with pytest.raises(SampleLost, match=f"CRC-32 {ref.crc32 ^ 1}.*captured again"):
        store.get(msgspec.structs.replace(ref, crc32=ref.crc32 ^ 1))
    assert store.counters["samples_lost"] == 1
    assert store.counters["damaged_reads"] == 4
    store.release(ref)


def test_a_short_read_is_read_again(open_store: Open, identity: RunIdentity, faults: Any) -> None:
    store = open_store(wrap=faults.wrap)
    ref = put(store, identity)
    faults.on("get_into", deny(64))
    assert_whole(store.get(ref))
    assert store.counters["damaged_reads"] == 1
    faults.on("get_into", *[deny(64)] * 4)
    with pytest.raises(SampleLost, match="found 64 bytes 4 times"):
        store.get(ref)
    store.release(ref)


@pytest.mark.parametrize("code", [-704, -707, -710, -712, -800, -801, -900, -901])
def test_one_bad_answer_to_a_get_is_not_the_end(
    open_store: Open, identity: RunIdentity, faults: Any, code: int
) -> None:
    store = open_store(wrap=faults.wrap)
    ref = put(store, identity)
    faults.on("get_into", answer(code))
    assert_whole(store.get(ref))
    store.release(ref)


def test_memory_that_a_lost_transfer_may_still_write_to_is_not_used_again(
    open_store: Open, identity: RunIdentity, faults: Any
) -> None:
    store = open_store(wrap=faults.wrap)
    ref = put(store, identity)
    large = {"x": torch.arange(100_000)}  # large enough to be lent
    large_ref = put(store, identity, large)
    for each, expected in ((ref, SAMPLE), (large_ref, large)):
        faults.calls.clear()
        faults.on("get_into", answer(-800))
        for _ in range(5):
            assert_whole(store.get(each), expected)
        addresses = [args[1] for method, args in faults.calls if method == "get_into"]
        assert addresses[0] == addresses[1], "what a late transfer writes are the bytes of the same sample"
        assert addresses[0] not in addresses[2:]
    store.release(large_ref)
    store.release(ref)


def test_a_get_whose_every_try_fails_names_the_trouble(open_store: Open, identity: RunIdentity, faults: Any) -> None:
    store = open_store(wrap=faults.wrap, retry_timeout_s=0.3)
    ref = put(store, identity)
    faults.on("get_into", *[answer(-900)] * 100)
    begin = time.monotonic()
    with pytest.raises(StoreUnavailable, match="-900"):
        store.get(ref)
    assert time.monotonic() - begin < 30
    store.release(ref)


def test_a_removal_that_fails_is_made_up_for(open_store: Open, identity: RunIdentity, faults: Any) -> None:
    store = open_store(wrap=faults.wrap)
    ref = put(store, identity)
    faults.on("remove", answer(-706), answer(-900))
    store.release(ref)
    eventually(lambda: store.key_count() == 0)
    eventually(lambda: store.counters["parked_removals"] == 0)
    store.release(ref)  # what is gone already is no failure
    assert store.counters["parked_removals"] == 0


def test_gc_tries_parked_removals_at_once(open_store: Open, identity: RunIdentity, faults: Any) -> None:
    store = open_store(wrap=faults.wrap)
    refs = [put(store, identity) for _ in range(5)]
    faults.on("batch_remove", *[answer([-900] * 5)] * 3)
    store.release_many(refs)
    pause = threading.Event()
    while sum(method == "batch_remove" for method, _ in faults.calls) < 4:  # the faults are used up, a pause follows
        store.gc()
        pause.wait(0.01)
    assert store.key_count() == 0


def test_closing_takes_parked_removals_along(open_store: Open, identity: RunIdentity, faults: Any) -> None:
    store, other = open_store(wrap=faults.wrap), open_store()
    ref = put(store, identity)
    faults.on("remove", *[answer(-900)] * 3)
    store.abort(ref)
    store.close()
    assert other.key_count() == 0


def test_a_part_of_a_batch_that_fails_is_made_up_for(open_store: Open, identity: RunIdentity, faults: Any) -> None:
    store = open_store(wrap=faults.wrap)
    samples = [NewSample(f"s{n:09d}", {"x": torch.full((500,), n)}, "t", 1) for n in range(6)]

    def lose_two(real: Callable[..., Any], keys: list[str], addresses: list[int], sizes: list[int], pin: Any) -> Any:
        kept = [0, 2, 3, 5]
        codes = real([keys[n] for n in kept], [addresses[n] for n in kept], [sizes[n] for n in kept], pin)
        return [codes[0], -900, codes[1], codes[2], -200, codes[3]]

    faults.on("batch_put_from", lose_two)
    faults.on("batch_get_into", damage)
    refs = store.put_many(samples, identity=identity)
    for found, sample in zip(store.get_many(refs), samples, strict=True):
        assert_whole(found, dict(sample.tensors))
    store.release_many(refs)
    assert store.key_count() == 0


def test_a_batch_that_cannot_be_put_leaves_nothing(open_store: Open, identity: RunIdentity, faults: Any) -> None:
    store = open_store(wrap=faults.wrap)
    samples = [NewSample(f"s{n:09d}", {"x": torch.full((500,), n)}, "t", 1) for n in range(100)]

    def refuse_last(real: Callable[..., Any], keys: list[str], *args: Any) -> Any:
        return [*real(keys, *args)[:-1], -1]

    faults.on("batch_put_from", lambda real, *args: real(*args), refuse_last)
    with pytest.raises(StoreRejected, match="-1 "):
        store.put_many(samples, identity=identity)
    eventually(lambda: store.key_count() == 0)


def test_a_buffer_that_cannot_be_registered_is_an_error(open_store: Open, identity: RunIdentity, faults: Any) -> None:
    store = open_store(wrap=faults.wrap)
    faults.on("register_buffer", answer(-600))
    with pytest.raises(StoreRejected, match=r"register .* -600"):
        put(store, identity)


def test_a_sweep_that_is_not_answered_is_an_error(open_store: Open, faults: Any) -> None:
    store = open_store(wrap=faults.wrap)
    faults.on("remove_by_regex", answer(-900))
    with pytest.raises(StoreUnavailable, match="sweep"):
        store.sweep()


def test_a_slow_store_does_not_hold_up_the_caller(open_store: Open, identity: RunIdentity, faults: Any) -> None:
    store = open_store(wrap=faults.wrap)
    go_on = threading.Event()

    def slow(real: Callable[..., Any], *args: Any) -> Any:
        go_on.wait(60)
        return real(*args)

    faults.on("put_from", slow)
    future = store.submit_put("s000000001", SAMPLE, identity=identity, source_task_id="t", num_tokens=1)
    assert not future.done()
    go_on.set()
    assert_whole(store.submit_get(future.result(60)).result(60))
    store.release(future.result())


BLOCK = {"x": torch.zeros(12 << 20, dtype=torch.uint8)}


def fill(store: MooncakeFeatureStore, identity: RunIdentity) -> list[SampleRef]:
    refs: list[SampleRef] = []
    while True:
        try:
            refs.append(put(store, identity, BLOCK))
        except StoreFull:
            return refs


def test_a_full_store_says_so_with_figures_and_evicts_nothing(
    open_store: Open, identity: RunIdentity, endpoints: StoreEndpoints
) -> None:
    store = open_store(put_timeout_s=0.2)
    refs = fill(store, identity)
    health = store.health()
    with pytest.raises(StoreFull, match=f"{health.used_bytes} of {health.total_bytes} bytes are used"):
        put(store, identity, BLOCK)
    assert health.evicted == 0
    for ref in refs:
        assert_whole(store.get(ref), BLOCK)
        store.release(ref)
    assert store.key_count() == 0
    assert probe_store(endpoints).evicted == 0


def test_a_producer_waits_for_room(open_store: Open, identity: RunIdentity) -> None:
    probe, store = open_store(put_timeout_s=0.05), open_store(put_timeout_s=30)
    refs = fill(probe, identity)
    future = store.submit_put("late", BLOCK, identity=identity, source_task_id="t", num_tokens=1)
    eventually(lambda: store.counters["full_answers"] > 3)
    assert not future.done()
    store.release(refs.pop())
    refs.append(future.result(60))
    assert store.counters["full_wait_seconds"] > 0
    store.release_many(refs)
    assert store.key_count() == 0
    assert store.health().evicted == 0


def test_closing_ends_a_put_that_waits_for_room(open_store: Open, identity: RunIdentity) -> None:
    probe, store = open_store(put_timeout_s=0.05), open_store(put_timeout_s=300)
    refs = fill(probe, identity)
    future = store.submit_put("late", BLOCK, identity=identity, source_task_id="t", num_tokens=1)
    eventually(lambda: store.counters["full_answers"] > 3)
    begin = time.monotonic()
    store.close()
    assert time.monotonic() - begin < 30
    with pytest.raises(StoreMisuse, match="close"):
        future.result(0)
    probe.release_many(refs)
    assert probe.key_count() == 0


def test_a_sample_that_can_never_fit_is_refused_at_once(open_store: Open, identity: RunIdentity) -> None:
    store = open_store(put_timeout_s=300)
    begin = time.monotonic()
    with pytest.raises(StoreFull, match="bytes were asked for"):
        put(store, identity, {"x": torch.zeros(200 << 20, dtype=torch.uint8)})
    assert time.monotonic() - begin < 30
