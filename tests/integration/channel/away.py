"""A Redis server that goes away: it ends, or goes on accepting connections and answers nothing."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import redis

from tests.integration.channel.conftest import redis_server

How = Literal["ended", "silent"]


class Leaving:
    """A server that answers until `leave` is called."""

    def __init__(self, port: int, pid: int) -> None:
        self.url = f"redis://127.0.0.1:{port}/0"
        self.pid = pid

    def leave(self, how: How) -> None:
        """End the server, or have it answer nothing any more."""
        os.kill(self.pid, signal.SIGKILL if how == "ended" else signal.SIGSTOP)

    def come_back(self) -> None:
        """Have a server that was silent answer again."""
        os.kill(self.pid, signal.SIGCONT)


@contextmanager
def leaving_redis(directory: Path) -> Iterator[Leaving]:
    """Run a server of one's own; it is gone afterwards, whatever became of it."""
    with redis_server(directory) as port:
        with redis.Redis(port=port) as client:
            server = Leaving(port, client.info()["process_id"])
        try:
            yield server
        finally:
            os.kill(server.pid, signal.SIGCONT)  # it is a child: until it is waited for, its id stays its own
