"""The platform on one machine: a Prefect server, three work pools, their workers and the deployments.

`up` is idempotent: it starts what is missing and leaves what runs. What it started is remembered in
``<home>/platform.json``, so that any later command finds it, and `down` ends exactly that. The server's database lies
in ``<home>/prefect``: the history of the runs survives.

Commands in one home share the platform: they change it one after the other (`exclusive`), and where nobody asked for
it to stay (`up` with `keep`), the last of its users takes it down (`leave`).

Nothing here imports Prefect at module level: its settings are read at import, from `environment`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import httpx
import psutil
from pydantic import BaseModel, ConfigDict

from disagg_core.errors import BadInput, DraftlineError, FailureClass
from disagg_core.files import write_atomically
from disagg_core.processes.retry import wait_until
from disagg_core.processes.shutdown import PLATFORM_S
from disagg_core.processes.tree import check_port, free_port, host_port, tail
from disagg_core.settings import Settings
from tasks.heartbeat import HEARTBEAT_ENVIRONMENT

START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = PLATFORM_S
_POLL_S = 0.1
_NO_PROXY = ("NO_PROXY", "no_proxy")


class PlatformError(DraftlineError):
    """A process of the local platform did not start or ended; its log is named."""

    failure_class: FailureClass = "preempted"


class Member(BaseModel):
    """One process of the platform; `created` guards against a process id that was given to somebody else."""

    model_config = ConfigDict(frozen=True)

    pid: int
    created: float

    @classmethod
    def of(cls, pid: int) -> Member:
        """Return the process with this id as it is now."""
        return cls(pid=pid, created=psutil.Process(pid).create_time())

    def process(self) -> psutil.Process | None:
        """Return the live process, or None if it has ended."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            if abs(process.create_time() - self.created) < 1.0 and process.status() != psutil.STATUS_ZOMBIE:
                return process
        return None


class LocalPlatform(BaseModel):
    """What runs on this machine: address of the server and the processes that make up the platform."""

    model_config = ConfigDict(frozen=True)

    host: str
    port: int
    members: dict[str, Member]
    users: list[Member] = []
    """The processes that follow a run on it."""
    kept: bool = False
    """Whether it stays when its last user has gone."""

    @property
    def api_url(self) -> str:
        """URL of the Prefect API."""
        return f"{self.ui_url}/api"

    @property
    def ui_url(self) -> str:
        """URL of the Prefect UI."""
        return f"http://{host_port(self.host, self.port)}"

    def run_url(self, flow_run_id: object) -> str:
        """URL of a flow run's page."""
        return f"{self.ui_url}/runs/flow-run/{flow_run_id}"

    def alive(self, name: str) -> bool:
        """Tell whether the member `name` is running."""
        member = self.members.get(name)
        return member is not None and member.process() is not None


def state_file(settings: Settings) -> Path:
    """Return the file that remembers the platform's processes."""
    return settings.home / "platform.json"


def find_platform(settings: Settings) -> LocalPlatform | None:
    """Return the platform if its server is running, else None."""
    path = state_file(settings)
    if not path.is_file():
        return None
    platform = LocalPlatform.model_validate_json(path.read_bytes())
    return platform if platform.alive("server") else None


def environment(settings: Settings, port: int) -> dict[str, str]:
    """Return the environment in which Prefect is imported, here and in every process of the platform.

    Nothing else of Prefect's may be in it (`adopt_environment`): a shell may hold database and credentials of another
    server, which is none of this platform's business. Credentials cannot be set to none, only left out.
    """
    home = settings.home / "prefect"
    database = f"sqlite+aiosqlite:///{home}/prefect.db"
    return {
        "DRAFTLINE_HOME": str(settings.home),
        **_around_proxies(settings.host),
        "PREFECT_HOME": str(home),
        "PREFECT_PROFILES_PATH": str(home / "profiles.toml"),
        "PREFECT_PROFILE": "ephemeral",
        "PREFECT_API_URL": f"http://{host_port(settings.host, port)}/api",
        "PREFECT_UI_URL": f"http://{host_port(settings.host, port)}",
        "PREFECT_API_DATABASE_CONNECTION_URL": database,
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": database,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_SERVER_UI_V2_ENABLED": "false",
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        **HEARTBEAT_ENVIRONMENT,
    }


def _around_proxies(host: str) -> dict[str, str]:
    """Return both spellings of NO_PROXY with this machine added to the user's list."""
    given = ",".join(os.environ.get(name, "") for name in _NO_PROXY)
    hosts = [name.strip() for name in given.split(",") if name.strip()]
    if "*" in hosts:
        return dict.fromkeys(_NO_PROXY, "*")
    return dict.fromkeys(_NO_PROXY, ",".join(dict.fromkeys([*hosts, host, "127.0.0.1", "localhost"])))


def _ours(settings: Settings, port: int) -> dict[str, str]:
    """Return the environment of the platform's processes: this one's without its Prefect settings, and ours."""
    others = {name: value for name, value in os.environ.items() if not name.upper().startswith("PREFECT_")}
    return {**others, **environment(settings, port)}


def adopt_environment(settings: Settings, port: int) -> None:
    """Make this process one of the platform's; Prefect must not have been imported yet."""
    ours = _ours(settings, port)
    for name in set(os.environ) - set(ours):
        del os.environ[name]
    os.environ.update(ours)


@contextlib.contextmanager
def exclusive(settings: Settings) -> Iterator[None]:
    """Let one process at a time change the platform; the others wait here.

    Raises:
        BadInput: nothing can be written into DRAFTLINE_HOME.
    """
    _prepare_home(settings.home)
    with (settings.home / "platform.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def up(settings: Settings, say: Callable[[str], None], *, keep: bool) -> LocalPlatform:
    """Start what is missing of the platform and return it; `say` is told what happens.

    With `keep` it stays until `down`, otherwise until its last user, of which this process is one, has called `leave`.
    Call it inside `exclusive`.

    Raises:
        PlatformError: a process ended or was not ready in time; the message names its log.
        PortTaken: the port in DRAFTLINE_PREFECT_PORT is used by somebody else.
    """
    platform = find_platform(settings)
    if platform is None:
        down(settings, say)  # workers whose server is gone: nothing else would remember them
        port = settings.prefect_port or free_port(settings.host)
        check_port(settings.host, port, "Prefect server")
        say("starting the Prefect server")
        platform = LocalPlatform(host=settings.host, port=port, members={})
        platform = _start(
            settings,
            platform,
            "server",
            [sys.executable, "-m", "flows.platform.server", "--host", settings.host, "--port", str(port)],
        )
    adopt_environment(settings, platform.port)
    _wait_ready(settings, platform)
    say("registering work pools and deployments")
    from flows.platform.deployments import register

    register()  # also on a platform that runs: somebody may have deleted one in the UI
    platform = _with_workers(settings, platform, say)
    users = platform.users if keep else [*platform.users, Member.of(os.getpid())]
    return _remember(settings, platform.model_copy(update={"users": users, "kept": keep or platform.kept}))


def _with_workers(settings: Settings, platform: LocalPlatform, say: Callable[[str], None]) -> LocalPlatform:
    """Start the workers unless they run; what an earlier platform left unfinished is marked as crashed before."""
    if platform.alive("workers"):
        return platform
    from flows.platform.deployments import crash_leftovers

    if leftovers := crash_leftovers():
        say(f"marked {leftovers} flow runs as crashed, whose processes ended with an earlier platform")
    say("starting the workers")
    command = [sys.executable, "-m", "flows.platform.workers", str(_log(settings, "workers"))]
    return _start(settings, platform, "workers", command)


def require_members(settings: Settings, say: Callable[[str], None]) -> None:
    """Start the workers again if they have ended; what they had started goes on without them, and waits for them.

    Raises:
        PlatformError: the Prefect server has ended; the message has the end of its log.
    """
    platform = LocalPlatform.model_validate_json(state_file(settings).read_bytes())
    require_server(settings, platform)
    if platform.alive("workers"):
        return
    with exclusive(settings):
        platform = LocalPlatform.model_validate_json(state_file(settings).read_bytes())
        say("the workers have ended")
        try:
            _with_workers(settings, platform, say)
        except httpx.HTTPError as error:
            say(f"the Prefect server does not answer at present: {error}")


def leave(settings: Settings) -> None:
    """Take the platform down if nobody else follows a run on it and it is not to be kept."""
    with exclusive(settings):
        path = state_file(settings)
        if not path.is_file():
            return
        platform = LocalPlatform.model_validate_json(path.read_bytes())
        others = [user for user in platform.users if user.pid != os.getpid() and user.process() is not None]
        if platform.kept or others:
            _remember(settings, platform.model_copy(update={"users": others}))
        else:
            down(settings, lambda _: None)


def down(settings: Settings, say: Callable[[str], None]) -> bool:
    """Cancel the runs, stop workers and server, and return whether anything was running."""
    path = state_file(settings)
    if not path.is_file():
        return False
    platform = LocalPlatform.model_validate_json(path.read_bytes())
    if platform.alive("server") and platform.alive("workers"):
        adopt_environment(settings, platform.port)
        if _answers(platform):
            _cancel_runs(say)
        else:
            say("the Prefect server does not answer: what runs is stopped without its word")
    stopped = False
    for name in ("workers", "server"):
        member = platform.members.get(name)
        process = member.process() if member else None
        if process is not None:
            say(f"stopping the {name}")
            _stop(process)
            stopped = True
    path.unlink(missing_ok=True)
    return stopped


def require_server(settings: Settings, platform: LocalPlatform) -> None:
    """Raise `PlatformError`, with the end of its log, if the Prefect server has ended."""
    if not platform.alive("server"):
        log = _log(settings, "server")
        raise PlatformError(f"the Prefect server has ended; the end of {log}:\n{tail(log, 5)}")


def _prepare_home(home: Path) -> None:
    try:
        home.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=home).close()
    except OSError as error:
        raise BadInput(
            f"DRAFTLINE_HOME: nothing can be written into {home} ({error.strerror}); choose another directory"
        ) from error


def _cancel_runs(say: Callable[[str], None]) -> None:
    """Cancel what runs; a server that does not answer must not keep the processes from being stopped."""
    from flows.platform.deployments import cancel_active_runs

    try:
        cancelled = cancel_active_runs(_STOP_TIMEOUT_S)
    except httpx.HTTPError as error:
        say(f"the runs could not be cancelled, the Prefect server does not answer: {error}")
        return
    if cancelled:
        say(f"cancelled {cancelled} flow runs")


def _log(settings: Settings, name: str) -> Path:
    return settings.home / "logs" / f"{name}.log"


def _start(settings: Settings, platform: LocalPlatform, name: str, command: list[str]) -> LocalPlatform:
    """Start a member as a process of its own session and remember it before anything else happens."""
    log = _log(settings, name)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=settings.home,
            env=_ours(settings, platform.port),
            start_new_session=True,
        )
    members = {**platform.members, name: Member.of(process.pid)}
    return _remember(settings, platform.model_copy(update={"members": members}))


def _remember(settings: Settings, platform: LocalPlatform) -> LocalPlatform:
    write_atomically(state_file(settings), platform.model_dump_json(indent=2))
    return platform


def _answers(platform: LocalPlatform) -> bool:
    with contextlib.suppress(httpx.TransportError):
        # Plain HTTP: loading the certificates would take longer than the answer.
        answer = httpx.get(f"{platform.api_url}/ready", timeout=5, trust_env=False, verify=False)
        return answer.status_code == httpx.codes.OK
    return False


def _wait_ready(settings: Settings, platform: LocalPlatform) -> None:
    def ready() -> bool:
        require_server(settings, platform)
        return _answers(platform)

    if not wait_until(ready, timeout_s=START_TIMEOUT_S, every_s=_POLL_S):
        raise PlatformError(
            f"the Prefect server was not ready after {START_TIMEOUT_S:.0f} s; see {_log(settings, 'server')}"
        )


def _stop(process: psutil.Process) -> None:
    """End a member and its descendants: SIGINT first (both stop cleanly on it), SIGKILL for what is left."""
    descendants = process.children(recursive=True)
    with contextlib.suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
        process.send_signal(signal.SIGINT)
        process.wait(_STOP_TIMEOUT_S / 2)
    for left in [process, *descendants]:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.kill()
    psutil.wait_procs([process, *descendants], timeout=5)


def describe(settings: Settings) -> Mapping[str, str]:
    """Return one line for each member of the platform, for ``draftline status``."""
    path = state_file(settings)
    if not path.is_file():
        return {}
    platform = LocalPlatform.model_validate(json.loads(path.read_bytes()))
    return {name: "running" if platform.alive(name) else "ended" for name in platform.members}
