"""Both backends, for real: a directory, and a redis-server of our own on a free port."""

import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import pytest
import redis

from disagg_core.channel import StreamingRefChannel
from tests.kit.waiting import eventually
from tests.ports import free_port

_names = count(1)


@contextmanager
def redis_server(directory: Path, *options: str, port: int | None = None) -> Iterator[int]:
    """Run a redis-server that persists nothing; yields its port once it answers."""
    port = port or free_port()
    log = (directory / f"redis-{port}.log").open("wb")
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no",
               "--dir", str(directory), *options]  # fmt: skip
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        eventually(lambda: _answers(port))
        yield port
    finally:
        process.terminate()
        process.wait(10)
        log.close()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="session")
def redis_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with redis_server(tmp_path_factory.mktemp("redis")) as port:
        yield port


@dataclass
class Place:
    """Where a test's channel is, and the channels that it opened there."""

    kind: str
    url: str
    opened: list[StreamingRefChannel] = field(default_factory=list)

    def open(self, **options: object) -> StreamingRefChannel:
        self.opened.append(StreamingRefChannel(self.url, **{"idle_timeout_s": 20.0, **options}))  # type: ignore[arg-type]
        return self.opened[-1]

    def crash(self, channel: StreamingRefChannel) -> None:
        """Let a channel go as a killed process does: the claims stay behind, nothing is said."""
        for side in (channel._writer, channel._reader):
            if side._heartbeat is not None:
                side._heartbeat.abandon()
                side._heartbeat = None
        channel._backend.close()


@pytest.fixture(params=["file", "redis"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    if request.param == "file":
        found = Place("file", f"file:{tmp_path / 'channel'}")
    else:
        port = request.getfixturevalue("redis_port")
        found = Place("redis", f"redis://127.0.0.1:{port}/0?channel=test-{next(_names)}")
    yield found
    for channel in found.opened:
        channel.disconnect()


@pytest.fixture
def client(redis_port: int) -> Iterator[redis.Redis]:
    with redis.Redis(port=redis_port, protocol=2) as connected:
        yield connected


@pytest.fixture
def server(tmp_path: Path) -> Callable[..., object]:
    """Start a server of the test's own: `with server("--requirepass", "x") as port`."""
    return lambda *options, **given: redis_server(tmp_path, *options, **given)
