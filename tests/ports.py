"""Ports for the servers that tests start."""

from __future__ import annotations

import contextlib
import os
from itertools import count

from disagg_core.errors import PortTaken
from disagg_core.processes.tree import check_port

_FIRST, _RANGE = 20_000, 10_000  # below the ports that the kernel hands out by itself
_next = count(os.getpid() * 37)


def free_port() -> int:
    """Return a port of the loopback interface that nothing listens on, another one at each call.

    It stays free until the test's server binds it, also while that server is away: processes that test at the same
    time begin at different places, and neither ``bind(0)`` nor an outgoing connection takes a port of this range.
    """
    while True:
        port = _FIRST + next(_next) % _RANGE
        with contextlib.suppress(PortTaken):
            check_port("127.0.0.1", port, "a test's server")
            return port
