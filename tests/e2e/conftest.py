"""A home of its own for each test, the tiny run document, and the `draftline` command as a person types it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "e2e" / "tiny.yaml"

Draftline = Callable[..., subprocess.Popen[str]]


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
    start("down").communicate(timeout=90)


@pytest.fixture
def tiny() -> str:
    """The run document of the tests."""
    return str(TINY)


@pytest.fixture
def ours(home: Path) -> Callable[[], list[psutil.Process]]:
    """Ask for every live process that was started in the test's home."""
    return lambda: processes_of(home)


def processes_of(home: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("DRAFTLINE_HOME") == str(home):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found
