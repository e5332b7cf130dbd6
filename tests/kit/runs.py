"""Runs as a person starts them: the `draftline` command in a home of the test's own, and the report that is left there.

A conftest of whole runs imports the fixtures `home` and `draftline` by name.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from disagg_core.report.document import RunReport

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "e2e" / "tiny.yaml"
"""The run document of the tests."""

Draftline = Callable[..., "subprocess.Popen[str]"]
"""Starts the command with the given arguments."""
Ours = Callable[[], list[psutil.Process]]
"""Returns every live process that was started in the test's home."""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def draftline(home: Path, tmp_path: Path) -> Iterator[Draftline]:
    """Start the command in the test's home; whatever the test leaves running is taken down at its end."""
    environment = {**os.environ, "DRAFTLINE_HOME": str(home), "OMP_NUM_THREADS": "1"}
    command = Path(sys.executable).with_name("draftline")

    def start(*arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [command, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            cwd=tmp_path,
            start_new_session=True,
        )

    yield start
    if (home / "platform.json").exists():
        start("down").communicate(timeout=90)


def settings(*changes: str) -> list[str]:
    """Return the arguments that change so many values of a run document, each told as ``section.key=value``."""
    return [word for change in changes for word in ("--set", change)]


def report_of(home: Path) -> RunReport:
    """Return the report of the only run of a home."""
    (path,) = home.glob("runs/*/report.json")
    return RunReport.model_validate_json(path.read_bytes())
