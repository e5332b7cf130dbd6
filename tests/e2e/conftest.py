"""Whole runs: a home of its own for each test, the tiny run document, and the processes that are left."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kit.processes import processes_of
from tests.kit.runs import TINY, Ours, draftline, home

__all__ = ["draftline", "home"]


@pytest.fixture
def tiny() -> str:
    """The run document of the tests."""
    return str(TINY)


@pytest.fixture
def ours(home: Path) -> Ours:
    """Ask for every live process that was started in the test's home."""
    return lambda: processes_of(home)
