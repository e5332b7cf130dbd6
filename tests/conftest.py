"""What holds for every test: a home of its own, and no limit on the time that one example of a property may take."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from disagg_core.settings import get_settings
from tests.order import dealt_out

# Tests share the machine with each other: time says nothing about the code.
settings.register_profile("shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared machine")


# A million objects are made while modules are imported and tests collected. They stay to the end: the garbage collector
# need not look at them, neither by itself nor when a test asks for it.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.hookimpl(trylast=True)  # of what is left when marks have been looked at
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    worker: dict[str, int] | None = getattr(config, "workerinput", None)
    if worker is not None:
        items[:] = dealt_out(items, worker["workercount"])


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let a test find nothing that another one, or a person, has left in the checkout."""
    monkeypatch.setenv("DRAFTLINE_HOME", str(tmp_path / "draftline-home"))
    get_settings.cache_clear()
    yield
    get_settings.cache_clear()
