"""A Prefect server of our own on a free port, with its scheduler, as a cluster's operator would start it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import certifi
import httpx
import pytest
from prefect.settings import PREFECT_API_SSL_CERT_FILE, PREFECT_API_URL, PREFECT_HOME, temporary_settings

from disagg_core.processes.tree import free_port, tail
from disagg_core.settings import Settings
from flows.platform import local
from flows.platform.deployments import ON_DEMAND, register
from tests.kit.prefect_database import copy_empty_database
from tests.kit.waiting import eventually

_OFTEN = {
    "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "1",
    "PREFECT_SERVER_SERVICES_SCHEDULER_RECENT_DEPLOYMENTS_LOOP_SECONDS": "1",
}


@dataclass(frozen=True)
class PrefectServer:
    """A running server: the environment in which its clients import Prefect, and where its log is."""

    environment: dict[str, str]
    log: Path

    @property
    def api_url(self) -> str:
        return self.environment["PREFECT_API_URL"]

    def find(self, what: str, **filters: object) -> list[dict[str, object]]:
        """Ask the API for `what` (``flow_runs``, ``deployments``, ...)."""
        answer = httpx.post(
            f"{self.api_url}/{what}/filter", json=filters, timeout=60, trust_env=False, verify=False
        ).raise_for_status()
        return list(answer.json())

    def ready(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            # To load certificates at each try would take the server's time; it speaks plain HTTP.
            answer = httpx.get(f"{self.api_url}/ready", trust_env=False, verify=False)
            return answer.status_code == httpx.codes.OK
        return False


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    server = server_in(tmp_path_factory.mktemp("prefect-server"))
    copy_empty_database(tmp_path_factory, Path(server.environment["PREFECT_HOME"]) / "prefect.db")
    with served(server):
        yield server


def server_in(home: Path) -> PrefectServer:
    """Return a server whose files are in `home`; it does not run yet."""
    settings = Settings(home=home)
    port = free_port(settings.host)
    few = {"PREFECT_API_SSL_CERT_FILE": str(_one_certificate(home / "one.pem"))}
    environment = {**os.environ, **local.environment(settings, port), **_OFTEN, **few, "OMP_NUM_THREADS": "1"}
    return PrefectServer(environment, home / "server.log")


def _one_certificate(path: Path) -> Path:
    """Write one of the usual certificates: each client loads them all, and the server speaks plain HTTP."""
    path.write_text("".join(Path(certifi.where()).read_text().partition("-----END CERTIFICATE-----\n")[:2]))
    return path


@contextlib.contextmanager
def served(server: PrefectServer) -> Iterator[subprocess.Popen[bytes]]:
    """Run the server for the block, once it is ready."""
    address = httpx.URL(server.api_url)
    command = [sys.executable, "-m", "flows.platform.server", "--host", address.host, "--port", str(address.port)]
    with running(command, server.environment, server.log) as process:
        eventually(lambda: server.ready() or process.poll() is not None, within_s=local.START_TIMEOUT_S, every_s=0.1)
        assert process.poll() is None, tail(server.log)
        yield process


@pytest.fixture
def api(prefect_server: PrefectServer) -> Iterator[PrefectServer]:
    """The server, spoken to by Prefect's client in this process."""
    with spoken_to(prefect_server):
        yield prefect_server


@pytest.fixture
def registered(api: PrefectServer) -> PrefectServer:
    """The server with our pools, deployments and automations, which are put there once."""
    if not api.find("deployments", deployments={"name": {"any_": [ON_DEMAND]}}):
        register()
    return api


@contextlib.contextmanager
def spoken_to(server: PrefectServer) -> Iterator[None]:
    """Have Prefect's client in this process speak to the server."""
    updates = {
        PREFECT_API_URL: server.api_url,
        PREFECT_HOME: Path(server.environment["PREFECT_HOME"]),
        PREFECT_API_SSL_CERT_FILE: server.environment["PREFECT_API_SSL_CERT_FILE"],
    }
    with temporary_settings(updates=updates):
        yield


@contextlib.contextmanager
def running(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run `command` until the end of the block."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            yield process
        finally:
            process.terminate()
            process.wait(30)
