"""Stopping the local platform: nothing of it may outlive `down`, whatever state it is in."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from disagg_core.settings import Settings
from flows import local

pytestmark = pytest.mark.unit

STUBBORN = (
    "import signal, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
)


@pytest.fixture
def stubborn() -> Iterator[subprocess.Popen[bytes]]:
    """A member that does not end when it is asked to."""
    with subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def remember(home: Path, process: subprocess.Popen[bytes]) -> Settings:
    settings = Settings(home=home)
    member = local.Member(pid=process.pid, created=psutil.Process(process.pid).create_time())
    platform = local.LocalPlatform(host="127.0.0.1", port=1, members={"workers": member})
    local.state_file(settings).write_text(platform.model_dump_json())
    return settings


def test_workers_whose_server_is_gone_are_stopped_even_if_they_do_not_listen(
    tmp_path: Path, stubborn: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_STOP_TIMEOUT_S", 0.2)
    settings = remember(tmp_path, stubborn)
    assert local.find_platform(settings) is None
    assert local.down(settings, lambda _: None)
    assert not psutil.pid_exists(stubborn.pid)
    assert not local.state_file(settings).exists()
    assert not local.down(settings, lambda _: None)
