"""Transfer memory: spans never overlap, everything comes back, nobody sees memory change under a tensor it holds."""

import gc
import threading
import time

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from disagg_core.errors import StoreRejected, StoreUnavailable
from disagg_core.store import staging
from disagg_core.store.capacity import STAGING_BYTES, most_regions, staging_bytes_for
from disagg_core.store.staging import PAGE, Slot, StagingPool
from tests.kit.waiting import eventually

pytestmark = pytest.mark.unit

REGION = 2 << 20


def pool_of(region: int = REGION) -> tuple[StagingPool, list[tuple[int, int]]]:
    registered: list[tuple[int, int]] = []

    def register(address: int, size: int) -> int:
        registered.append((address, size))
        return 0

    return StagingPool(region, register, "test"), registered


class Slots(RuleBasedStateMachine):
    """Slots are taken, given back, lent and dropped in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.registered = pool_of()
        self.held: list[tuple[Slot, int]] = []
        self.lent: list[tuple[torch.Tensor, int]] = []
        self.mark = 0

    @rule(size=st.integers(0, REGION // 4))
    def take(self, size: int) -> None:
        slot = self.pool.acquire_now(size)
        if slot is None:
            assert self.held or self.lent
            return
        self.mark = (self.mark + 1) % 251
        slot.buffer.fill_(self.mark)
        self.held.append((slot, self.mark))

    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        if self.held:
            slot, _ = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
            slot.release()
            slot.release()

    @rule(data=st.data())
    def lend(self, data: st.DataObject) -> None:
        if self.held:
            slot, mark = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
            if slot.size:
                self.lent.append((slot.lend(), mark))
            slot.release()

    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        if self.lent:
            self.lent.pop(data.draw(st.integers(0, len(self.lent) - 1)))

    @invariant()
    def nobodys_bytes_have_changed(self) -> None:
        for slot, mark in self.held:
            assert bool((slot.buffer == mark).all())
            assert slot.address % PAGE == 0
        for tensor, mark in self.lent:
            assert bool((tensor == mark).all())

    def teardown(self) -> None:
        for slot, _ in self.held:
            slot.release()
        self.lent.clear()
        gc.collect()
        if self.registered:
            assert self.pool.acquire_now(REGION) is not None, "something did not come back"
            assert len(self.registered) == 1


TestSlots = Slots.TestCase
TestSlots.settings = settings(max_examples=12, stateful_step_count=25, deadline=None)


def test_a_part_of_a_lent_tensor_keeps_its_memory() -> None:
    pool, _ = pool_of()
    slot = pool.acquire(REGION, 1)
    view = slot.lend()[100:200].view(torch.int32)
    assert pool.acquire_now(1) is None
    del view
    assert pool.acquire_now(REGION) is not None


def test_a_request_waits_for_room_and_a_larger_one_is_not_overtaken() -> None:
    pool, _ = pool_of()
    first, second = pool.acquire(REGION // 2, 1), pool.acquire(REGION // 2, 1)
    order: list[str] = []
    large = threading.Thread(target=lambda: order.append(f"large {pool.acquire(REGION, 60).size}"))
    large.start()
    eventually(pool._turn.locked, every_s=0.001)
    small = threading.Thread(target=lambda: order.append(f"small {pool.acquire(REGION, 60).size}"))
    small.start()
    first.release()
    second.release()
    large.join(60)
    assert order == [f"large {REGION}"]
    pool.returned(pool._regions[0], 0, REGION)
    small.join(60)
    assert order[1:] == [f"small {REGION}"]


def test_no_room_is_a_named_error_in_time() -> None:
    pool, _ = pool_of()
    held = pool.acquire(REGION, 1)
    begin = time.monotonic()
    with pytest.raises(StoreUnavailable, match=f"4096 bytes of the {REGION} bytes of test staging"):
        pool.acquire(4096, 0.1)
    assert time.monotonic() - begin < 30
    held.release()


def test_a_larger_sample_makes_the_memory_larger_once() -> None:
    pool, registered = pool_of()
    for _ in range(3):
        with pool.acquire(5 * REGION // 2, 1) as slot:
            slot.buffer.fill_(7)
    assert [size for _, size in registered] == [3 * REGION]


def test_samples_sorted_by_length_leave_nothing_behind() -> None:
    registered: dict[int, int] = {}

    def register(address: int, size: int) -> int:
        registered[address] = size
        return 0

    def unregister(address: int) -> int:
        del registered[address]
        return 0

    pool = StagingPool(REGION, register, "test", unregister)
    made = set()
    for nbytes in range(PAGE, 8 * REGION, 7 * PAGE):
        with pool.acquire(nbytes, 1) as slot:
            slot.buffer[-1] = 1
            made.add(slot.address)
            assert pool.total_bytes <= max(REGION, 5 * nbytes // 4 + staging.HUGE_PAGE)
        assert sum(registered.values()) == pool.total_bytes
        del slot
    assert len(registered) == 1


@pytest.mark.parametrize("tokens", [512, 2048, 4096, 32_768, 131_072])
def test_a_planned_run_takes_what_the_plan_says_whatever_the_order_of_its_samples(tokens: int) -> None:
    per_token = 32_773  # Qwen3-8B
    planned = staging_bytes_for(tokens * per_token + 256)
    pool = StagingPool(planned, lambda address, size: 0, "test")
    make = pool._new_region
    made = []

    def without_memory(nbytes: int) -> staging.Region:
        made.append(nbytes)
        region = make(REGION)  # only the sizes matter
        region.free = [(0, nbytes)]
        return region

    pool._new_region = without_memory  # type: ignore[method-assign]
    lengths = [*range(16, tokens, max(1, tokens // 97)), tokens, tokens // 2, tokens]
    for length in lengths:
        slot = pool.acquire_now(length * per_token + 256)
        assert slot is not None, "the default sample goes the way without a copy"
        slot.release()
    assert made == [planned]


def test_a_pool_has_room_for_several_samples_unless_they_are_huge() -> None:
    largest = 2048 * 32_773 + 256
    assert staging_bytes_for(1000) == STAGING_BYTES
    assert 4 * largest <= staging_bytes_for(largest) <= 4 * largest + (4 << 20)
    assert staging_bytes_for(4 << 30) == 4 << 30
    assert [most_regions(size) for size in (STAGING_BYTES, 2 * STAGING_BYTES, 4 << 30)] == [4, 2, 2]


def test_a_larger_sample_waits_until_nobody_holds_the_smaller_memory() -> None:
    pool, registered = pool_of()
    held = pool.acquire(PAGE, 1)
    waiting = threading.Thread(target=lambda: pool.acquire(2 * REGION, 10).release())
    waiting.start()
    eventually(pool._turn.locked, every_s=0.001)
    assert [size for _, size in registered] == [REGION]
    held.release()
    waiting.join(60)
    assert [size for _, size in registered] == [REGION, 2 * REGION]
    assert pool.total_bytes == 2 * REGION


def test_idle_memory_is_given_up_and_taken_again() -> None:
    unregistered: list[int] = []
    pool = StagingPool(REGION, lambda address, size: 0, "test", lambda address: unregistered.append(address) or 0)
    first = pool.acquire(PAGE, 1)
    address = first.address
    pool.give_up_idle(0.0)
    assert pool.total_bytes == REGION
    first.release()
    pool.give_up_idle(60.0)
    assert pool.total_bytes == REGION
    pool.give_up_idle(0.0)
    assert (pool.total_bytes, unregistered) == (0, [address])
    pool.acquire(PAGE, 1).release()
    assert pool.total_bytes == REGION


def test_memory_that_a_lost_put_may_read_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "RETIRED_FOR_S", 0.2)
    pool, _ = pool_of()
    with pool.acquire(REGION, 1) as slot:
        slot.part(0, PAGE).keep_mapped()
    pool.give_up_idle(0.0)
    pool.acquire(2 * REGION, 1).release()
    assert pool.total_bytes == 3 * REGION
    threading.Event().wait(0.25)
    pool.give_up_idle(0.0)
    assert pool.total_bytes == 0


def test_memory_that_mooncake_does_not_let_go_of_is_named() -> None:
    pool = StagingPool(REGION, lambda address, size: 0, "test", lambda address: -600)
    pool.acquire(PAGE, 1).release()
    with pytest.raises(StoreRejected, match=f"unregister {REGION} bytes .* -600"):
        pool.give_up_idle(0.0)


class Cuda:
    """A CUDA runtime that notes which GPU the calling thread had named when it locked or unlocked memory."""

    def __init__(self) -> None:
        self.current = threading.local()
        self.calls: list[tuple[str, object]] = []

    def device(self, gpu: torch.device) -> "Cuda":
        self.current.entering = gpu
        return self

    def __enter__(self) -> None:
        self.current.gpu = self.current.entering

    def __exit__(self, *_: object) -> None:
        del self.current.gpu

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        self.calls.append(("lock", getattr(self.current, "gpu", "none named")))
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        self.calls.append(("unlock", getattr(self.current, "gpu", "none named")))
        return 0


def test_every_thread_names_the_gpu_for_which_it_locks_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, gpu = Cuda(), torch.device("cuda", 3)
    monkeypatch.setattr(torch.cuda, "device", cuda.device)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)
    pool, _ = pool_of()

    def use() -> None:
        pool.acquire(PAGE, 1).release()
        pool.pin(gpu)
        pool.acquire(2 * REGION, 1).release()
        pool.give_up_idle(0.0)
        pool.acquire(PAGE, 1).release()

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    pool.close()
    assert [call for call, _ in cuda.calls] == 3 * ["lock", "unlock"]
    assert {where for _, where in cuda.calls} == {gpu}
    assert not pool.is_pinned


def test_tainted_memory_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "RETIRED_FOR_S", 0.2)
    pool, registered = pool_of()
    slot = pool.acquire(REGION, 1)
    address, slot.tainted = slot.address, True
    slot.release()
    other = pool.acquire(REGION, 1)
    assert other.address != address
    assert len(registered) == 2
    threading.Event().wait(0.25)
    assert pool.acquire(REGION, 1).address == address


def test_a_refused_registration_is_named() -> None:
    pool = StagingPool(REGION, lambda address, size: -600, "test")
    with pytest.raises(StoreRejected, match=f"register {REGION} bytes .* -600"):
        pool.acquire(10, 1)


def test_memory_is_populated_once_and_only_as_far_as_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    ranges: list[tuple[int, int]] = []
    monkeypatch.setattr(staging, "populate", lambda address, size: ranges.append((address, size)) or 0)
    pool = StagingPool(8 << 20, lambda address, size: 0, "test")

    with pool.acquire(1 << 20, 1.0) as first, pool.acquire(2 << 20, 1.0):
        begin = first.address
    with pool.acquire(3 << 20, 1.0), pool.acquire(1 << 20, 1.0):
        pass

    assert ranges == [(begin, 1 << 20), (begin + (1 << 20), 2 << 20), (begin + (3 << 20), 1 << 20)]


def test_memory_of_a_kernel_that_does_not_populate_is_touched_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "populate", lambda address, size: 22)
    pool = StagingPool(8 << 20, lambda address, size: 0, "test")

    with pool.acquire(1 << 20, 1.0) as slot:
        assert not slot.buffer.any()
