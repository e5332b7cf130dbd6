"""Stopping the local platform: nothing of it may outlive `down`, whatever state it is in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from disagg_core.errors import BadInput
from disagg_core.processes.retry import wait_until
from disagg_core.processes.tree import lives
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


FOREIGN = {
    "PREFECT_SERVER_DATABASE_CONNECTION_URL": "sqlite+aiosqlite:////nowhere/foreign.db",
    "PREFECT_API_DATABASE_CONNECTION_URL": "sqlite+aiosqlite:////nowhere/foreign.db",
    "PREFECT_API_KEY": "pnu_secret",
    "PREFECT_API_AUTH_STRING": "admin:pass",
    "PREFECT_SERVER_API_AUTH_STRING": "admin:pass",
    "PREFECT_API_URL": "https://prefect.example.org/api",
    "PREFECT_PROFILE": "production",
    "PREFECT_SERVER_DATABASE_DRIVER": "postgresql+asyncpg",
    "PREFECT_CLIENT_CUSTOM_HEADERS": '{"X-Company": "1"}',
}
LOOK = """
import json, prefect
from prefect.settings import get_current_settings
s = get_current_settings()
print(json.dumps({
    "database": s.server.database.connection_url.get_secret_value(), "api": s.api.url,
    "secrets": [x.get_secret_value() for x in (s.api.key, s.api.auth_string, s.server.api.auth_string) if x],
    "driver": s.server.database.driver, "headers": s.client.custom_headers,
}))
"""


def seen_by_prefect(environment: dict[str, str]) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", LOOK], env=environment, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    found["secrets"] = [secret for secret in found["secrets"] if secret]
    return found


def test_settings_of_another_prefect_server_do_not_reach_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in FOREIGN.items():
        monkeypatch.setenv(name, value)
    settings = Settings(home=tmp_path)
    ours = {
        "database": f"sqlite+aiosqlite:///{tmp_path}/prefect/prefect.db",
        "api": "http://127.0.0.1:4321/api",
        "secrets": [],
        "driver": None,
        "headers": {},
    }

    assert seen_by_prefect(local._ours(settings, 4321)) == ours
    monkeypatch.setattr(os, "environ", os.environ.copy())
    local.adopt_environment(settings, 4321)
    assert not set(FOREIGN.values()) & set(os.environ.values())


def test_an_ipv6_host_is_written_in_brackets(tmp_path: Path) -> None:
    environment = local.environment(Settings(home=tmp_path, host="::1"), 4321)
    platform = local.LocalPlatform(host="::1", port=4321, members={})
    assert environment["PREFECT_API_URL"] == platform.api_url == "http://[::1]:4321/api"
    assert "::1" in environment["NO_PROXY"].split(",")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "127.0.0.1,localhost"),
        ({"no_proxy": "example.org, 10.0.0.0/8"}, "example.org,10.0.0.0/8,127.0.0.1,localhost"),
        ({"NO_PROXY": "a.org", "no_proxy": "b.org"}, "a.org,b.org,127.0.0.1,localhost"),
        ({"no_proxy": "*"}, "*"),
    ],
)
def test_our_own_hosts_go_around_a_proxy_and_the_users_list_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, str], expected: str
) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"http_proxy": "http://127.0.0.1:9", **given}.items():
        monkeypatch.setenv(name, value)
    environment = local.environment(Settings(home=tmp_path), 4321)
    assert environment["PREFECT_API_URL"] == "http://127.0.0.1:4321/api"
    assert environment["NO_PROXY"] == environment["no_proxy"] == expected

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(204)
            self.end_headers()

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.setenv(name, environment[name])
        assert httpx.get(f"http://127.0.0.1:{server.server_port}").status_code == 204
        server.shutdown()


def test_workers_that_died_are_started_again_by_who_follows_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(home=tmp_path)
    server, dead = local.Member.of(os.getpid()), local.Member(pid=os.getpid(), created=0.0)
    platform = local.LocalPlatform(host="127.0.0.1", port=1, members={"server": server, "workers": dead})
    local.state_file(settings).write_text(platform.model_dump_json())
    said: list[str] = []
    monkeypatch.setattr("flows.platform.deployments.crash_leftovers", lambda: 0)
    monkeypatch.setattr(local, "_ours", lambda *_: dict(os.environ))
    monkeypatch.setattr(local.sys, "executable", "/bin/sleep")
    real = subprocess.Popen
    started: list[subprocess.Popen[bytes]] = []

    def sleep(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        started.append(real(["/bin/sleep", "60"], **options))
        return started[-1]

    monkeypatch.setattr(local.subprocess, "Popen", sleep)
    local.require_members(settings, said.append)
    local.require_members(settings, said.append)
    monkeypatch.undo()

    (process,) = started
    found = local.find_platform(settings)
    assert found is not None
    assert found.members["workers"].pid == process.pid
    assert said == ["the workers have ended", "starting the workers"]
    process.kill()
    process.wait()


def test_the_keeper_starts_workers_again_that_were_killed_and_ends_all_of_them(tmp_path: Path) -> None:
    """What the killed ones had started lives on until the platform ends, and has its files as long as it lives."""
    run = "import time; time.sleep(300)"
    worker = (
        "import os, pathlib, subprocess, sys, time\n"
        "pathlib.Path(sys.argv[-1], 'file').touch()\n"
        f"run = subprocess.Popen([sys.executable, '-c', {run!r}], start_new_session=True)\n"
        "print(os.getpid(), run.pid, flush=True)\n"
        "time.sleep(300)"
    )
    log = tmp_path / "workers.log"
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    code = (
        "import sys; from pathlib import Path; from flows.platform import workers\n"
        "workers._FIRST_PAUSE_S = workers._LOOK_S = 0.1\n"
        f"workers.keep([sys.executable, '-c', {worker!r}], Path({str(log)!r}))"
    )
    environment = {**os.environ, "TMPDIR": str(temporary)}
    keeper = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[3], env=environment)

    def started(count: int) -> list[list[psutil.Process]]:
        lines: list[str] = []

        def there() -> bool:
            lines[:] = log.read_text().splitlines() if log.is_file() else []
            return len(lines) >= count

        assert wait_until(there, timeout_s=60, every_s=0.05)
        return [[psutil.Process(int(pid)) for pid in line.split() if psutil.pid_exists(int(pid))] for line in lines]

    try:
        ((first, run_of_first),) = started(1)
        first.kill()
        everything = [run_of_first, *started(2)[1]]
        assert lives(run_of_first)
        assert len(list(temporary.glob("*/file"))) == 2
        run_of_first.kill()
        assert wait_until(lambda: len(list(temporary.iterdir())) == 1, timeout_s=60, every_s=0.05)
        keeper.terminate()
        keeper.wait(60)
        assert len(everything) == 3
        assert not any(map(lives, everything))
        assert list(temporary.iterdir()) == []
    finally:
        keeper.kill()
        keeper.wait()
