"""A platform for chaos scenarios: `draftline up` in a home of its own, spoken to over the server's plain API."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from disagg_core.processes.retry import wait_until
from tests.kit.processes import alive, command_of, environment_of

FINAL = ("COMPLETED", "FAILED", "CANCELLED", "CRASHED")
START_S = 200.0
SERVER_READY_S = 120.0


class ChaosPlatform:
    """Server, pools and workers in `home`; `temporary` is the TMPDIR of all that runs there."""

    def __init__(self, home: Path, environment: Mapping[str, str] | None = None) -> None:
        self.home = home
        self.temporary = home.with_name(f"{home.name}-tmp")
        self.temporary.mkdir(parents=True, exist_ok=True)
        self.environment = {
            **os.environ,
            **(environment or {}),
            "DRAFTLINE_HOME": str(home),
            "TMPDIR": str(self.temporary),
            "OMP_NUM_THREADS": "1",
        }
        self._servers: list[subprocess.Popen[bytes]] = []

    # --- the commands of a person -------------------------------------------------------------------------------

    def draftline(self, *arguments: str, timeout_s: float = START_S) -> str:
        """Run the command and return what it says; it must succeed."""
        return self._command("draftline", arguments, {}, timeout_s)

    def prefect(self, *arguments: str) -> str:
        """Run Prefect's command against this platform's server, as `draftline up` says how to; it must succeed."""
        return self._command("prefect", arguments, {"PREFECT_API_URL": self.api}, 60.0)

    def _command(self, name: str, arguments: tuple[str, ...], environment: Mapping[str, str], timeout_s: float) -> str:
        command = [str(Path(sys.executable).with_name(name)), *arguments]
        done = subprocess.run(
            command,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}"
        return done.stdout

    def up(self) -> None:
        """Bring the platform up, to stay."""
        self.draftline("up")

    def down(self) -> None:
        """Take it down; nothing of it is left."""
        self.draftline("down")
        for server in self._servers:
            server.send_signal(signal.SIGINT)
            server.wait(30)
        assert wait_until(lambda: not self.processes(), timeout_s=15, every_s=0.1), self.processes()

    # --- its processes ------------------------------------------------------------------------------------------

    @property
    def state(self) -> dict[str, Any]:
        """What the platform remembers of itself."""
        return json.loads((self.home / "platform.json").read_bytes())

    @property
    def api(self) -> str:
        """The URL of the server's API."""
        return f"http://127.0.0.1:{self.state['port']}/api"

    def server(self) -> psutil.Process:
        """Return the process of the Prefect server."""
        if self._servers:
            return psutil.Process(self._servers[-1].pid)
        return psutil.Process(self.state["members"]["server"]["pid"])

    def workers(self) -> psutil.Process:
        """Return the process in which the workers of all pools run."""
        keeper = psutil.Process(self.state["members"]["workers"]["pid"])
        (workers,) = (child for child in keeper.children() if " serve " in command_of(child))
        return workers

    def workers_other_than(self, dead: psutil.Process) -> bool:
        """Whether workers run in another process than `dead`."""
        with contextlib.suppress(ValueError):
            return self.workers().pid != dead.pid
        return False

    def start_server_again(self) -> None:
        """Start a server that was killed, at its old place; wait until it answers."""
        (port,) = (part.removesuffix("/api").rpartition(":")[2] for part in [self.api])
        command = [sys.executable, "-m", "flows.platform.server", "--host", "127.0.0.1", "--port", port]
        environment = {**self.environment, **_prefect_settings(self.home, int(port))}
        with (self.home / "logs" / "server.log").open("ab") as log:
            self._servers.append(
                subprocess.Popen(
                    command, env=environment, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
                )
            )
        assert wait_until(self.answers, timeout_s=SERVER_READY_S, every_s=0.1), "the server did not come back"

    def processes(self) -> list[psutil.Process]:
        """Return every live process that was started in this home."""
        return [process for process in alive() if environment_of(process).get("DRAFTLINE_HOME") == str(self.home)]

    # --- its server ---------------------------------------------------------------------------------------------

    def answers(self) -> bool:
        """Whether the server is ready."""
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.api}/ready", timeout=5, trust_env=False).is_success
        return False

    def get(self, path: str) -> Any:
        """Return what the API answers."""
        return httpx.get(f"{self.api}/{path}", timeout=30, trust_env=False).raise_for_status().json()

    def post(self, path: str, **body: Any) -> Any:
        """Ask the API for something."""
        return httpx.post(f"{self.api}/{path}", json=body, timeout=30, trust_env=False).raise_for_status().json()

    def taken_slots(self) -> dict[str, int]:
        """Return the slots that are taken, by the name of their limit."""
        limits = self.post("v2/concurrency_limits/filter")
        return {limit["name"]: limit["active_slots"] for limit in limits if limit["active_slots"]}


@contextmanager
def platform_in(home: Path, environment: Mapping[str, str] | None = None) -> Iterator[ChaosPlatform]:
    """Keep a platform up for the block; also what comes up of one that fails is taken down."""
    platform = ChaosPlatform(home, environment)
    try:
        platform.up()
        yield platform
    finally:
        platform.down()


def _prefect_settings(home: Path, port: int) -> dict[str, str]:
    from disagg_core.settings import Settings
    from flows.platform import local

    return local.environment(Settings(home=home), port)
