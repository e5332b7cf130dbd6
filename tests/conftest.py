"""Every test has a home of its own: it finds nothing that another test, or a person, has left in the checkout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from disagg_core.settings import get_settings


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("DRAFTLINE_HOME", str(tmp_path / "draftline-home"))
    get_settings.cache_clear()
    yield
    get_settings.cache_clear()
