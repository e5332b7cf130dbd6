"""One process's connection to Mooncake: opened after a probe, guarded against fork and use after close.

The native client must not be touched in a forked child (it hangs the child and corrupts the parent's connection) nor
after its ``close`` (it crashes the process). Every call goes through `Session.raw`, which holds these rules.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from disagg_core.errors import StoreMisuse, StoreUnavailable
from disagg_core.plan import StoreEndpoints
from disagg_core.store.library import load_mooncake
from disagg_core.store.master import MasterView, wait_for_port

LOCAL_BUFFER_BYTES = 16 << 20
METADATA = "P2PHANDSHAKE"
LONGEST_CALL_S = 60.0


class Session:
    """A Mooncake client that mounts no memory.

    Args:
        wrap: applied to the native client; fault-injecting tests put themselves in between here.

    Raises:
        MissingLibrary: Mooncake cannot be loaded.
        StoreUnavailable: nothing answers at the master's address, or its set-up failed.
    """

    def __init__(
        self,
        endpoints: StoreEndpoints,
        *,
        host: str,
        protocol: str,
        connect_timeout_s: float,
        wrap: Callable[[Any], Any],
    ) -> None:
        mooncake = load_mooncake()
        wait_for_port(endpoints.master_address, connect_timeout_s, "master_address")  # setup() alone blocks for 90 s
        wait_until_ready(MasterView(endpoints), connect_timeout_s)
        native = mooncake.MooncakeDistributedStore()
        code = native.setup(host, METADATA, 0, LOCAL_BUFFER_BYTES, protocol, "", endpoints.master_address)
        if code:
            raise StoreUnavailable(
                f"Mooncake could not connect {host} to the master at {endpoints.master_address} over {protocol}: "
                f"code {code}; see the master's log"
            )
        self.hard_pin = mooncake.ReplicateConfig()
        self.hard_pin.with_hard_pin = True
        self._native = native
        self._client = wrap(native)
        self._pid = os.getpid()
        self._calls = 0
        self._closed = False
        self._idle = threading.Condition()

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    @property
    def is_here(self) -> bool:
        """Whether this is the process that opened the client."""
        return os.getpid() == self._pid

    @contextmanager
    def raw(self) -> Iterator[Any]:
        """Yield the client for one call.

        Raises:
            StoreMisuse: in a forked child, or after `close`.
        """
        self.check()
        with self._idle:
            self.check()
            self._calls += 1
        try:
            yield self._client
        finally:
            with self._idle:
                self._calls -= 1
                self._idle.notify_all()

    def check(self) -> None:
        """Raise `StoreMisuse` if the client may not be used here and now."""
        if os.getpid() != self._pid:
            raise StoreMisuse(
                f"the feature store was opened in process {self._pid} and used in its forked child {os.getpid()}; "
                "open it in the child, or start the child with the 'spawn' method"
            )
        if self._closed:
            raise StoreMisuse("the feature store was used after close(); open a new one")

    def close(self) -> None:
        """Wait for the calls in progress, then close the client. Does nothing in a forked child or a second time."""
        if os.getpid() != self._pid:
            return
        with self._idle:
            if self._closed:
                return
            self._closed = True
            deadline = time.monotonic() + LONGEST_CALL_S
            while self._calls and time.monotonic() < deadline:
                self._idle.wait(deadline - time.monotonic())
            if self._calls:
                raise StoreUnavailable(f"{self._calls} Mooncake calls did not return in {LONGEST_CALL_S:g} s")
        self._native.close()


def wait_until_ready(master: MasterView, timeout_s: float) -> None:
    """Return once the master says that it serves requests.

    Raises:
        StoreUnavailable: it did not for `timeout_s` seconds.
    """
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not master.is_ready():
        if time.monotonic() >= deadline:
            raise StoreUnavailable(
                f"expected service_ready from the master's /health at {master.endpoints.metrics_address}, "
                f"found none in {timeout_s:g} s; is this the metrics port of {master.endpoints.master_address}?"
            )
        pause.wait(0.05)
