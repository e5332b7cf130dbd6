"""Stopping the local platform: nothing of it may outlive `down`, whatever state it is in."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from disagg_core.errors import BadInput
from disagg_core.settings import Settings, get_settings
from flows.platform import local

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


@pytest.mark.parametrize(("kept", "shared", "stays"), [(False, False, False), (True, False, True), (False, True, True)])
def test_the_last_user_takes_down_a_platform_that_nobody_keeps(
    tmp_path: Path,
    stubborn: subprocess.Popen[bytes],
    monkeypatch: pytest.MonkeyPatch,
    kept: bool,
    shared: bool,
    stays: bool,
) -> None:
    monkeypatch.setattr(local, "_STOP_TIMEOUT_S", 0.2)
    settings = remember(tmp_path, stubborn)
    platform = local.LocalPlatform.model_validate_json(local.state_file(settings).read_bytes())
    users = [local.Member.of(os.getpid()), local.Member(pid=os.getpid(), created=0.0)]
    users += [local.Member.of(os.getppid())] if shared else []
    local.state_file(settings).write_text(platform.model_copy(update={"users": users, "kept": kept}).model_dump_json())
    local.leave(settings)
    assert psutil.pid_exists(stubborn.pid) == stays
    assert local.state_file(settings).exists() == stays


def test_a_server_that_ended_is_named_with_the_end_of_its_log(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "server.log").write_text("database is full\n")
    platform = local.LocalPlatform(host="127.0.0.1", port=1, members={})
    with pytest.raises(local.PlatformError, match=r"the Prefect server has ended.*\n.*database is full"):
        local.require_server(settings, platform)


def test_a_home_that_cannot_be_written_is_bad_input(tmp_path: Path) -> None:
    home = tmp_path / "file"
    home.touch()
    complaint = r"DRAFTLINE_HOME: nothing can be written into .*file .File exists"
    with pytest.raises(BadInput, match=complaint), local.exclusive(Settings(home=home)):
        pass


def test_a_setting_of_the_wrong_type_is_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRAFTLINE_PREFECT_PORT", "four")
    get_settings.cache_clear()
    with pytest.raises(BadInput, match="DRAFTLINE_PREFECT_PORT: Input should be a valid integer"):
        get_settings()
