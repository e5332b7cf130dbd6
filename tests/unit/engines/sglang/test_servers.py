"""The command line of a server that we start, where its Python is looked for, and the ends of its process."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from disagg_core.engines.servers.pool import PoolMember, ServerPool
from disagg_core.engines.servers.process import ManagedServer
from disagg_core.engines.sglang.client import SglangClient
from disagg_core.engines.sglang.launch import ServerLaunch, find_sglang_python
from disagg_core.errors import MissingLibrary, TargetUnavailable
from disagg_core.run_spec.document import TargetSection
from disagg_core.settings import Settings
from disagg_core.target.facts import TargetFacts
from tests.kit.waiting import eventually
from tests.unit.engines.kit import CAPTURE

pytestmark = pytest.mark.unit


def launch(section: TargetSection, facts: TargetFacts, **changes: object) -> ServerLaunch:
    fields: dict[str, object] = {"capture": CAPTURE, "longest": 32, "cpu": False, "host": "10.0.0.5", **changes}
    return ServerLaunch(Path("/sglang/bin/python"), section, facts, **fields)


def value(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


def test_layers_are_always_named_and_nothing_is_cached(section: TargetSection, facts: TargetFacts) -> None:
    command = launch(section, facts).command(port=30000, base_gpu=4)

    start = command.index("--return-aux-hidden-state-layer-ids")
    assert command[start + 1 : start + 5] == ["0", "2", "4", "--disable-radix-cache"]
    assert {"--disable-radix-cache", "--enable-return-aux-hidden-states", "--disable-prefill-cuda-graph"} <= {*command}
    assert value(command, "--speculative-algorithm") == "EAGLE3"
    assert (value(command, "--host"), value(command, "--port")) == ("10.0.0.5", "30000")
    assert value(command, "--base-gpu-id") == "4"
    assert value(command, "--dtype") == "float32"


def test_the_runs_own_arguments_come_last(section: TargetSection, facts: TargetFacts) -> None:
    own = section.model_copy(update={"server_args": ("--mem-fraction-static", "0.7")})

    assert launch(own, facts).command(port=1, base_gpu=0)[-2:] == ["--mem-fraction-static", "0.7"]


def test_sampling_heeds_seeds_where_sglang_can(section: TargetSection, facts: TargetFacts) -> None:
    assert "--enable-deterministic-inference" in launch(section, facts, sampled=True).command(port=1, base_gpu=0)
    assert "--enable-deterministic-inference" not in launch(section, facts).command(port=1, base_gpu=0)


def test_a_sample_as_long_as_the_context_fits(section: TargetSection, facts: TargetFacts) -> None:
    tight, roomy = launch(section, facts, longest=64), launch(section, facts, longest=32)

    assert value(tight.command(port=1, base_gpu=0), "--context-length") == "66"
    assert tight.environment()["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] == "1"
    assert "--context-length" not in roomy.command(port=1, base_gpu=0)


def test_a_server_does_not_start_without_capture(section: TargetSection, facts: TargetFacts) -> None:
    environment = launch(section, facts, cpu=True).environment()

    assert environment["DRAFTLINE_CAPTURE_REQUIRED"] == "1"
    assert environment["SGLANG_USE_CPU_ENGINE"] == "1"
    assert environment["DRAFTLINE_HOST"] == "10.0.0.5"


def test_a_server_imports_nothing_from_the_directory_it_is_started_in(
    section: TargetSection, facts: TargetFacts
) -> None:
    """A checkout holds another environment's metadata, which would name the plugin in place of the server's own."""
    assert launch(section, facts).environment()["PYTHONSAFEPATH"] == "1"


def test_a_missing_environment_says_how_to_build_it(tmp_path: Path) -> None:
    with pytest.raises(MissingLibrary, match=r"infra/sglang/setup\.sh --cuda"):
        find_sglang_python(Settings(home=tmp_path), checkout=tmp_path)


def test_an_environment_without_sglang_is_refused(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 0.5.22\n")
    python.chmod(0o755)

    with pytest.raises(MissingLibrary, match=r"expected sglang 0\.5\.23, found 0\.5\.22"):
        find_sglang_python(Settings(home=tmp_path, sglang_python=python))


class Stubborn(ServerLaunch):
    """Launches a process that never answers and that SIGTERM does not end."""

    def command(self, *, port: int, base_gpu: int) -> list[str]:
        code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True)"
        return [sys.executable, "-c", f"{code}; signal.pause()"]


@pytest.fixture
def stubborn(section: TargetSection, facts: TargetFacts, tmp_path: Path) -> Callable[[int], ManagedServer]:
    def make(index: int) -> ManagedServer:
        launch = Stubborn(Path(sys.executable), section, facts, CAPTURE, longest=32, cpu=True, host="127.0.0.1")
        return ManagedServer(launch, index=index, log_dir=tmp_path)

    return make


def is_up(server: ManagedServer) -> bool:
    return server.log.is_file() and "up" in server.log.read_text()


def test_servers_that_do_not_want_to_end_are_ended_together(stubborn: Callable[[int], ManagedServer]) -> None:
    """Four of them one after the other would take longer than a pool takes to close."""
    servers = [stubborn(index) for index in range(4)]
    members = [PoolMember(SglangClient(server.name, server.url, timeout_s=1.0), managed=server) for server in servers]
    pool = ServerPool(members, concurrency=1, check=lambda client: None, start_timeout_s=60.0, place_timeout_s=1.0)
    starting = threading.Thread(target=start_in_vain, args=(pool,))
    starting.start()
    for server in servers:
        eventually(lambda server=server: is_up(server), f"{server.name} is up")
    pids = [server.pid for server in servers]

    pool.close()

    starting.join(60)
    assert not starting.is_alive()
    assert not [pid for pid in pids if pid is not None and psutil.pid_exists(pid)]


def start_in_vain(pool: ServerPool) -> None:
    with contextlib.suppress(TargetUnavailable):
        pool.start()


def test_a_closed_server_does_not_start_again(stubborn: Callable[[int], ManagedServer]) -> None:
    server = stubborn(0)
    server.start()
    eventually(lambda: is_up(server), "it is up")
    server.close()

    server.start()

    assert server.pid is None
    assert server.exit_reason() == "not started"


class Answering(ServerLaunch):
    """Launches a process that answers every request on the port that it is told."""

    def command(self, *, port: int, base_gpu: int) -> list[str]:
        return [sys.executable, "-c", ANSWER, str(port)]


ANSWER = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
HTTPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
"""


def test_each_start_has_a_port_of_its_own_and_the_client_follows(
    section: TargetSection, facts: TargetFacts, tmp_path: Path
) -> None:
    """While a server is down or loads its model, somebody takes the port that it had."""
    launch = Answering(Path(sys.executable), section, facts, CAPTURE, longest=32, cpu=True, host="127.0.0.1")
    server = ManagedServer(launch, index=0, log_dir=tmp_path)
    client = SglangClient(server.name, server.url, timeout_s=5.0)
    member = PoolMember(client, managed=server)
    pool = ServerPool([member], concurrency=1, check=lambda _: None, start_timeout_s=60.0, place_timeout_s=1.0)
    starter = threading.Thread(target=pool.start)  # lives as long as its server
    starter.start()
    starter.join(60)
    before = server.port
    with contextlib.closing(socket.socket()) as somebody:
        somebody.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        eventually(lambda: taken(somebody, before), "the port is somebody else's")
        eventually(lambda: server.port != before and client.healthy(1.0), "the server is back elsewhere")
        assert client.url == server.url
    pool.close()


def taken(somebody: socket.socket, port: int) -> bool:
    try:
        somebody.bind(("127.0.0.1", port))
    except OSError:
        return False
    somebody.listen()
    return True


def test_every_server_gets_a_port_for_nccl_that_is_not_its_own(section: TargetSection, facts: TargetFacts) -> None:
    first, second = (launch(section, facts).command(port=30000, base_gpu=gpu) for gpu in (0, 1))
    ports = {value(first, "--nccl-port"), value(second, "--nccl-port"), "30000"}
    assert len(ports) == 3


class Holding(ServerLaunch):
    """Launches a process with a child that has mapped files in shared memory."""

    def command(self, *, port: int, base_gpu: int) -> list[str]:
        return [sys.executable, "-c", HOLD, *map(str, held_by(port))]


def held_by(port: int) -> list[Path]:
    """The kinds of files that SGLang maps."""
    kinds = ("sglang_loads_test", "sgl_shm_test", "sem.mp-test")
    return [Path(f"/dev/shm/{kind}_{port}_{os.getpid()}") for kind in kinds]


HOLD = """
import mmap, os, sys, tempfile
tempfile.NamedTemporaryFile(delete=False)  # as SGLang does for each of its sockets
os.fork()
held = []
for name in sys.argv[1:]:
    with open(name, "a+b") as file:
        file.truncate(4096)
        held.append(mmap.mmap(file.fileno(), 4096))
import signal
signal.pause()
"""


@pytest.mark.parametrize("end", ["stopped", "killed", "killed with its producer"])
def test_a_server_leaves_neither_shared_memory_nor_temporary_files_behind(
    end: str, section: TargetSection, facts: TargetFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    launch = Holding(Path(sys.executable), section, facts, CAPTURE, longest=32, cpu=True, host="127.0.0.1")
    server = ManagedServer(launch, index=0, log_dir=tmp_path)
    server.start()
    held = held_by(server.port)
    eventually(lambda: all(path.is_file() for path in held), "the server holds shared memory")
    eventually(lambda: len(list(tmp_path.glob("*.shared-memory"))) or server.became_healthy(), "which was noted")
    assert list(temporary.rglob("tmp*"))
    if end != "stopped":
        assert server.pid is not None
        os.killpg(server.pid, signal.SIGKILL)
        eventually(lambda: server.exit_reason() is not None, "it is dead")
    if end == "killed with its producer":
        server = ManagedServer(launch, index=0, log_dir=tmp_path)
        server.start()

    server.close()

    assert not list(Path("/dev/shm").glob(f"*test_*_{os.getpid()}"))
    assert not list(temporary.iterdir())
    assert not [*tmp_path.glob("*.shared-memory"), *tmp_path.glob("*.scratch")]
