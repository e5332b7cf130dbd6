"""The owner finds the memory that was mounted, and faults in no other."""

import mmap
import threading

import pytest
import torch

from disagg_core.store.owner import SMALLEST_MAPPING, added, fault_in, writable_mappings

pytestmark = pytest.mark.unit

M = SMALLEST_MAPPING


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([], [(0, M)], [(0, M)]),
        ([(0, M)], [(0, M)], []),
        ([(0, M)], [(0, 3 * M)], [(M, 3 * M)]),
        ([(M, 2 * M)], [(0, 4 * M)], [(0, M), (2 * M, 4 * M)]),
        ([(0, 9)], [(0, 9), (20, 20 + M - 1)], []),
        ([(0, 5 * M)], [(0, M), (2 * M, 3 * M)], []),
    ],
)
def test_new_memory_is_what_was_not_there(before: list, after: list, expected: list) -> None:
    assert added(before, after) == expected


def test_faulting_in_gives_every_page_its_memory() -> None:
    before = writable_mappings()
    memory = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    spans = added(before, writable_mappings())
    assert any(begin <= address < end for begin, end in spans)
    fault_in(spans, threading.Event(), lambda status: None)
    assert resident(address) >= 64 << 10


def resident(address: int) -> int:
    """KiB in memory of the mapping that holds `address`."""
    inside = False
    for line in open("/proc/self/smaps"):  # noqa: SIM115, PTH123
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            begin, end = (int(part, 16) for part in head.split("-"))
            inside = begin <= address < end
        elif inside and head == "Rss:":
            return int(line.split()[1])
    raise AssertionError("no such mapping")
