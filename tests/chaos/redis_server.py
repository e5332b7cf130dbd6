"""A Redis server that can be killed, started again and demoted, and keeps its data meanwhile."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import TracebackType

import redis

from disagg_core.processes.retry import wait_until
from tests.ports import free_port

START_S = 20.0


class RedisServer:
    """One server on a port of its own; as a context manager it runs for the block."""

    def __init__(self, directory: Path, *, replica_of: int | None = None) -> None:
        directory.mkdir(parents=True)
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._directory = directory
        self._replica_of = replica_of
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> RedisServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def start(self) -> None:
        """Start it, or start it again with what it had written; return when it answers."""
        options = ["--save", "", "--appendonly", "yes", "--appendfsync", "always", "--dir", str(self._directory)]
        if self._replica_of is not None:
            options += ["--replicaof", "127.0.0.1", str(self._replica_of)]
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", *options]
        with (self._directory / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        assert wait_until(self._answers, timeout_s=START_S, every_s=0.05), "redis-server did not start"
        assert wait_until(self._linked, timeout_s=START_S, every_s=0.05), "the replica has no link to its primary"

    def kill(self) -> None:
        """End it at once."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(10)

    def hand_over_to(self, other: RedisServer) -> None:
        """Become the replica of `other`, which has all that was written here; this one then refuses writes."""
        with redis.Redis(port=self.port) as client:
            client.execute_command("FAILOVER", "TO", "127.0.0.1", str(other.port))
            assert wait_until(lambda: _role(client) == "slave", timeout_s=START_S, every_s=0.01), "no fail-over"

    def _linked(self) -> bool:
        with redis.Redis(port=self.port) as client:
            return client.info("replication").get("master_link_status", "up") == "up"  # type: ignore[union-attr]

    def _answers(self) -> bool:
        try:
            with redis.Redis(port=self.port) as client:
                return bool(client.ping())
        except (redis.ConnectionError, redis.exceptions.BusyLoadingError):
            return False


def _role(client: redis.Redis) -> str:
    return str(client.info("replication")["role"])  # type: ignore[index]
