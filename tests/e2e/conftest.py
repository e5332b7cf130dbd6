"""Whole runs: a home of its own for each test, the tiny run document, and the processes that are left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.platform import ChaosPlatform, platform_in
from tests.e2e.nights import Nights
from tests.kit.prefect_database import copy_empty_database
from tests.kit.processes import processes_of
from tests.kit.runs import TINY, Ours, draftline, home

__all__ = ["draftline", "home"]


@pytest.fixture
def tiny() -> str:
    """The run document of the tests."""
    return str(TINY)


@pytest.fixture
def lived_in(home: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Leave the database of an earlier platform in the home, without any run; the slow tests begin with nothing."""
    copy_empty_database(tmp_path_factory, home / "prefect" / "prefect.db")


@pytest.fixture
def ours(home: Path) -> Ours:
    """Ask for every live process that was started in the test's home."""
    return lambda: processes_of(home)


@pytest.fixture(scope="session")
def nights_platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChaosPlatform]:
    """A platform for nights that leave it as it was."""
    with platform_in(tmp_path_factory.mktemp("nights") / "home") as platform:
        yield platform


@pytest.fixture
def nights(nights_platform: ChaosPlatform, tmp_path: Path) -> Nights:
    """Recurring training with prompts and a registry of the test's own; nothing is registered yet."""
    return Nights(nights_platform, tmp_path)
