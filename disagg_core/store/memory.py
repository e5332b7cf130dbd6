"""The transfer memory of one client: its pools, registered with Mooncake, given back to the machine when idle."""

from __future__ import annotations

import logging
import threading

from disagg_core.errors import StoreError
from disagg_core.store import staging
from disagg_core.store.session import Session
from disagg_core.store.staging import StagingPool

log = logging.getLogger(__name__)

LOOK_EVERY_S = 5.0


class TransferMemory:
    """Makes the pools of one client, `staging_bytes` each, and looks every few seconds which of them are idle."""

    def __init__(self, session: Session, staging_bytes: int) -> None:
        self._session = session
        self._staging_bytes = staging_bytes
        self._pools: list[StagingPool] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._look, name="store-idle", daemon=True)
        self._thread.start()

    @property
    def total_bytes(self) -> int:
        """Bytes that all pools hold at present."""
        return sum(pool.total_bytes for pool in self._pools)

    def pool(self, name: str) -> StagingPool:
        """Return a new pool; `name` says in messages what it is for."""
        pool = StagingPool(self._staging_bytes, self._register, name, self._unregister)
        self._pools.append(pool)
        return pool

    def stop(self) -> None:
        """End the thread, which makes no call to the client afterwards."""
        self._stopped.set()
        self._thread.join()

    def close(self) -> None:
        """Undo the page-locking of all pools."""
        for pool in self._pools:
            pool.close()

    def _look(self) -> None:
        while not self._stopped.wait(LOOK_EVERY_S):
            try:
                with self._session.raw():
                    for pool in self._pools:
                        pool.give_up_idle(staging.IDLE_S)
            except StoreError as error:
                log.warning("transfer memory is kept although it is idle: %s", error)
                return

    def _register(self, address: int, size: int) -> int:
        code: int = self._session.client.register_buffer(address, size)
        return code

    def _unregister(self, address: int) -> int:
        code: int = self._session.client.unregister_buffer(address)
        return code
