"""One process's connection to Mooncake: opened after a probe, guarded against fork and use after close.

The native client must not be touched in a forked child (it hangs the child and corrupts the parent's connection) nor
after its ``close`` (it crashes the process). Every call is made inside `Session.operation` or `Session.raw`, which hold
these rules.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from disagg_core.errors import StoreMisuse, StoreUnavailable
from disagg_core.processes.retry import wait_until
from disagg_core.store.endpoints import StoreEndpoints
from disagg_core.store.library import load_mooncake
from disagg_core.store.master import MASTER_POLL_S, MasterView, wait_for_port

LOCAL_BUFFER_BYTES = 16 << 20
METADATA = "P2PHANDSHAKE"
LONGEST_OPERATION_S = 60.0
_LIVE: weakref.WeakSet[Session] = weakref.WeakSet()
_CLOSED = "the feature store was used after close(); open a new one"


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
        _LIVE.add(self)
        self._client = wrap(native)
        self._pid = os.getpid()
        self.inherited = False
        self._operations = 0
        self._calls = 0
        self._ending = False
        self._idle = threading.Condition()

    def operation(self) -> Operation:
        """Return a context for one operation of a caller, which closing waits for.

        Entering it raises `StoreMisuse` in a forked child, or once closing has begun.
        """
        return Operation(self)

    @property
    def client(self) -> Any:
        """The client, for calls inside an `operation`."""
        return self._client

    @contextmanager
    def raw(self) -> Iterator[Any]:
        """Yield the client for one call outside of an operation, which `close` waits for.

        Raises:
            StoreMisuse: in a forked child, or after `close`.
        """
        self._check_process()
        with self._idle:
            if self._native is None:
                raise StoreMisuse(_CLOSED)
            self._calls += 1
        try:
            yield self._client
        finally:
            with self._idle:
                self._calls -= 1
                self._idle.notify_all()

    def check(self) -> None:
        """Raise `StoreMisuse` if no operation may begin or go on here and now."""
        self._check_process()
        if self._ending:
            raise StoreMisuse(_CLOSED)

    def begin(self) -> None:
        """Count an operation that begins; see `operation`."""
        self._check_process()
        with self._idle:
            self.check()
            self._operations += 1

    def end(self) -> None:
        """Count an operation that has ended."""
        with self._idle:
            self._operations -= 1
            if self._ending:
                self._idle.notify_all()

    def end_operations(self) -> bool:
        """Refuse new operations and wait for those in progress; False if there is nothing to end here.

        Raises:
            StoreUnavailable: an operation does not come back; the client cannot be closed then.
        """
        if self.inherited:
            return False
        with self._idle:
            if self._ending:
                return False
            self._ending = True
            if not self._idle.wait_for(lambda: not self._operations, LONGEST_OPERATION_S):
                raise StoreUnavailable(
                    f"{self._operations} operations of the feature store did not end in {LONGEST_OPERATION_S:g} s"
                )
        return True

    def close(self) -> None:
        """Wait for the calls in progress, then close the client."""
        with self._idle:
            native, self._native, self._client = self._native, None, None
            if not self._idle.wait_for(lambda: not self._calls, LONGEST_OPERATION_S):
                raise StoreUnavailable(f"{self._calls} Mooncake calls did not return in {LONGEST_OPERATION_S:g} s")
        native.close()

    def _check_process(self) -> None:
        if self.inherited:
            raise StoreMisuse(
                f"the feature store was opened in process {self._pid} and used in its forked child {os.getpid()}; "
                "open it in the child, or start the child with the 'spawn' method"
            )


class Operation:
    """One operation of a caller while it runs."""

    __slots__ = ("_session",)

    def __init__(self, session: Session) -> None:
        self._session = session

    def __enter__(self) -> None:
        self._session.begin()

    def __exit__(self, *_: object) -> None:
        self._session.end()


def _disown_native_clients() -> None:
    """In a forked child: refuse the clients that it has inherited, and keep them: their destructors crash it."""
    for session in _LIVE:
        session.inherited = True
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(session._native))


os.register_at_fork(after_in_child=_disown_native_clients)


def wait_until_ready(master: MasterView, timeout_s: float) -> None:
    """Return once the master says that it serves requests.

    Raises:
        StoreUnavailable: it did not for `timeout_s` seconds.
    """
    if not wait_until(master.is_ready, timeout_s=timeout_s, every_s=MASTER_POLL_S):
        raise StoreUnavailable(
            f"expected service_ready from the master's /health at {master.endpoints.metrics_address}, "
            f"found none in {timeout_s:g} s; is this the metrics port of {master.endpoints.master_address}?"
        )
