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
from disagg_core.store.staging import PAGE, Slot, StagingPool

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
    large = threading.Thread(target=lambda: order.append(f"large {pool.acquire(REGION, 5).size}"))
    large.start()
    while not pool._turn.locked():
        threading.Event().wait(0.001)
    small = threading.Thread(target=lambda: order.append(f"small {pool.acquire(REGION, 5).size}"))
    small.start()
    first.release()
    second.release()
    large.join(5)
    assert order == [f"large {REGION}"]
    pool.returned(pool._regions[0], 0, REGION)
    small.join(5)
    assert order[1:] == [f"small {REGION}"]


def test_no_room_is_a_named_error_in_time() -> None:
    pool, _ = pool_of()
    held = pool.acquire(REGION, 1)
    begin = time.monotonic()
    with pytest.raises(StoreUnavailable, match=f"4096 bytes of the {REGION} bytes of test staging"):
        pool.acquire(4096, 0.1)
    assert time.monotonic() - begin < 30
    held.release()


def test_a_larger_sample_gets_memory_of_its_own_once() -> None:
    pool, registered = pool_of()
    for _ in range(3):
        with pool.acquire(5 * REGION // 2, 1) as slot:
            slot.buffer.fill_(7)
    assert [size for _, size in registered] == [3 * REGION]


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
