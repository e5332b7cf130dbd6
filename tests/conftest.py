"""What holds for every test: a home of its own, and no limit on the time that one example of a property may take."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from disagg_core.settings import get_settings

# Tests share the machine with each other: time says nothing about the code.
settings.register_profile("shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared machine")


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let a test find nothing that another one, or a person, has left in the checkout."""
    monkeypatch.setenv("DRAFTLINE_HOME", str(tmp_path / "draftline-home"))
    get_settings.cache_clear()
    yield
    get_settings.cache_clear()
