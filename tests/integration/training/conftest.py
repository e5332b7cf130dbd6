"""The consumer with everything around it but a target: a real store, a real file channel, and tiny samples."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def run_id(tmp_path: Path) -> str:
    return f"run-{tmp_path.name}".replace("[", "-").replace("]", "")
