"""Gives memory its pages before it is used: a first touch in the middle of a transfer makes it several times slower."""

from __future__ import annotations

import ctypes

_HUGEPAGE = 14
_POPULATE_WRITE = 23
"""Linux 5.14."""
_libc = ctypes.CDLL(None, use_errno=True)
"""Called through ctypes, which lets the process's other threads go on meanwhile; `mmap.madvise` does not."""


def prefer_huge_pages(address: int, size: int) -> None:
    """Ask for pages of 2 MiB from `address` on; a machine that has none goes on without."""
    _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), _HUGEPAGE)


def populate(address: int, size: int) -> int:
    """Give every page of the range its memory now; return 0, or the errno of a kernel that does not."""
    failed = _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), _POPULATE_WRITE)
    return ctypes.get_errno() if failed else 0
