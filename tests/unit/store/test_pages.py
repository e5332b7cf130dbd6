"""Memory gets its pages before it is used, and nobody else waits for that."""

import mmap
import threading

import pytest
import torch

from disagg_core.store.pages import populate, prefer_huge_pages

pytestmark = pytest.mark.unit


@pytest.fixture
def memory() -> mmap.mmap:
    return mmap.mmap(-1, 256 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def test_other_threads_go_on_while_memory_is_populated(memory: mmap.mmap) -> None:
    address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    prefer_huge_pages(address, len(memory))
    codes: list[int] = []
    populating = threading.Thread(target=lambda: codes.append(populate(address, len(memory))))
    beats = 0

    populating.start()
    while populating.is_alive():
        beats += 1

    assert codes == [0]
    assert beats > 1000, "the interpreter's lock is not held meanwhile"


def test_memory_that_is_not_there_is_told_by_its_errno() -> None:
    assert populate(1 << 46, 4096) == 12
