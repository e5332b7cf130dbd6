"""Memory for large tensors is used again, and never while somebody still reads it."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg_core.host_memory import SMALLEST, HostMemory

pytestmark = pytest.mark.unit

MIB = 1 << 20


def test_what_was_dropped_is_given_out_again() -> None:
    memory = HostMemory()
    first = memory.empty((3, MIB), torch.bfloat16)
    place = first.data_ptr()
    del first

    again = memory.empty((MIB, 2), torch.float16)

    assert again.data_ptr() == place
    assert (again.shape, again.dtype) == ((MIB, 2), torch.float16)
    assert memory.total_bytes == 6 * MIB


def test_a_part_of_a_tensor_keeps_its_memory() -> None:
    memory = HostMemory()
    part = memory.empty((4 * MIB,), torch.uint8).fill_(7)[MIB : MIB + 8]

    memory.empty((4 * MIB,), torch.uint8).fill_(8)

    assert part.tolist() == [7] * 8


def test_what_a_backward_pass_still_needs_is_kept() -> None:
    memory, weight = HostMemory(), torch.ones(1, requires_grad=True)
    states = memory.empty((MIB,), torch.float32).fill_(3)
    total = (states * weight).sum()
    del states

    memory.empty((MIB,), torch.float32).fill_(5)
    total.backward()

    assert weight.grad is not None
    assert weight.grad.item() == 3 * MIB


def test_small_tensors_are_left_to_the_allocator() -> None:
    memory = HostMemory()

    small = memory.empty((SMALLEST - 1,), torch.uint8)

    assert small.shape == (SMALLEST - 1,)
    assert memory.empty((0, 3), torch.float32).shape == (0, 3)
    assert memory.total_bytes == 0


def test_memory_that_fits_no_longer_makes_way() -> None:
    memory = HostMemory()
    for mebibytes in (2, 16, 4, 30, 8):
        memory.empty((mebibytes, MIB), torch.uint8)
    assert memory.total_bytes <= 30 * MIB


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["take", "drop"]), st.integers(0, 5 * MIB)), max_size=30))
def test_nobodys_bytes_change_and_no_more_is_held_than_was_in_use_at_once(steps: list[tuple[str, int]]) -> None:
    memory = HostMemory()
    held: list[tuple[torch.Tensor, int]] = []
    most = 0
    for mark, (what, size) in enumerate(steps):
        if what == "take":
            held.append((memory.empty((size,), torch.uint8).fill_(mark), mark))
        elif held:
            held.pop(size % len(held))
        in_use = sum(max(2 * MIB, int(1.5 * len(tensor))) + 2 * MIB for tensor, _ in held if len(tensor) >= SMALLEST)
        most = max(most, in_use)
        assert memory.total_bytes <= most
        assert all(bool((tensor == expected).all()) for tensor, expected in held)


def test_many_threads_never_share_memory() -> None:
    memory, wrong = HostMemory(), []

    def work(mark: int) -> None:
        for number in range(50):
            tensor = memory.empty((MIB + 4096 * (number % 7),), torch.uint8).fill_(mark)
            if not bool((tensor == mark).all()):
                wrong.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    gc.collect()

    assert wrong == []
    assert memory.total_bytes <= 4 * 2 * 2 * MIB  # each thread takes one before it drops the last
