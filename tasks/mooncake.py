"""The feature store of a run: started before the first attempt, checked before each, torn down last."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.logging.loggers import LoggingAdapter

from disagg_core.errors import StoreError, StoreKilled, StoreTooLarge, StoreUnavailable
from disagg_core.run.plan import RunPlan
from disagg_core.settings import get_settings
from disagg_core.store import StoreServices, probe_store, running_store
from disagg_core.store.endpoints import StoreEndpoints

_POLL_S = 1.0
_OWNERS_JOIN_S = 60.0
"""An external store that is too small is so for good when no owner has joined it for so long."""
_CHECK_S = 10.0
"""The sample that checks a store waits so long for room."""


class FeatureStoreServices:
    """Master and owner of a run's store: ours (managed), or somebody else's that we only check (external).

    A store that was there once in this run is waited for, up to ``orchestration.stall_timeout_s``: between attempts an
    external one may be on its way up again, and memory for a managed one may still be in use. One that is refused for
    its size from the beginning is the user's to change.
    """

    def __init__(self, plan: RunPlan) -> None:
        self._plan = plan
        self._running = contextlib.ExitStack()
        self._managed: StoreServices | None = None
        self._endpoints: StoreEndpoints | None = None

    @property
    def endpoints(self) -> StoreEndpoints:
        """Where the store is that was ready last."""
        assert self._endpoints is not None, "no store was ready yet"
        return self._endpoints

    async def ready(self, attempt: int) -> StoreEndpoints:
        """Return the endpoints of a store that answers and has room; start a managed one anew if it was lost."""
        return await self.prepare(attempt, get_run_logger())

    async def prepare(self, attempt: int, log: logging.Logger | LoggingAdapter) -> StoreEndpoints:
        """Do what `ready` does, telling `log` what is waited for and what was found.

        Raises:
            StoreTooLarge: the store has never been large enough for this run.
            StoreKilled: the kernel killed a store that was started anew for its memory.
            StoreUnavailable: there was none before the stall timeout.
        """
        if self._plan.spec.store.mode == "external":
            self._endpoints, swept = await self._external(attempt, log)
        else:
            self._endpoints, swept = await self._ours(attempt, log)
        if swept:
            log.warning("removed %d samples that an earlier attempt left behind", swept)
        return self._endpoints

    def require_alive(self) -> None:
        """Raise as `StoreServices` does if a process of a managed store has ended; an external one is not ours."""
        if self._managed is not None:
            self._managed.require_alive()

    def stop(self) -> None:
        """Stop what we started."""
        self._managed = None
        self._running.close()

    async def _ours(self, attempt: int, log: logging.Logger | LoggingAdapter) -> tuple[StoreEndpoints, int]:
        deadline = time.monotonic() + self._plan.spec.orchestration.stall_timeout_s
        while True:
            anew = self._managed is None
            try:
                if self._managed is None:
                    self._managed = await asyncio.to_thread(self._start, attempt)  # faulting memory in takes minutes
                self.require_alive()  # the master counts on an owner that was killed for a minute more
                endpoints = self._managed.endpoints
                await asyncio.to_thread(probe_store, endpoints, self._plan.store_capacity)
                return endpoints, await asyncio.to_thread(self._check, endpoints, attempt)
            except (StoreError, StoreTooLarge) as error:
                self.stop()
                if self._endpoints is None or (anew and isinstance(error, StoreKilled)):
                    raise
                if time.monotonic() >= deadline:
                    raise StoreUnavailable(f"the feature store cannot be started anew: {error}") from error
                log.warning("the feature store was lost and is started anew: %s", error)
            await asyncio.sleep(_POLL_S)

    def _start(self, attempt: int) -> StoreServices:
        return self._running.enter_context(
            running_store(
                self._plan.store_capacity,
                host=get_settings().host,
                log_dir=self._plan.dir.attempt(attempt).logs,
                protocol=self._plan.spec.store.protocol,
            )
        )

    async def _external(self, attempt: int, log: logging.Logger | LoggingAdapter) -> tuple[StoreEndpoints, int]:
        section, capacity = self._plan.spec.store, self._plan.store_capacity
        endpoints = StoreEndpoints(
            master_address=section.master_address or "", metrics_address=section.metrics_address or ""
        )
        limit_s = self._plan.spec.orchestration.stall_timeout_s
        began = joined = time.monotonic()
        most, said = 0, ""
        while True:
            try:
                found = (await asyncio.to_thread(probe_store, endpoints)).total_bytes
                if found >= capacity:
                    return endpoints, await asyncio.to_thread(self._check, endpoints, attempt)
                trouble = f"it has {found} of {capacity} bytes; is an owner of it still starting?"
            except StoreError as error:
                if error.failure_class == "bug":
                    raise
                found, trouble = 0, str(error)
            now = time.monotonic()
            if found > most:
                most, joined = found, now
            if found and self._endpoints is None and now - joined >= min(_OWNERS_JOIN_S, limit_s):
                await asyncio.to_thread(probe_store, endpoints, capacity)
            if now - began >= limit_s:
                raise StoreUnavailable(
                    f"the external feature store was waited for over {limit_s:g} s (orchestration.stall_timeout_s): "
                    f"{trouble}"
                )
            if trouble != said:
                log.warning("waiting for the external feature store: %s", trouble)
                said = trouble
            await asyncio.sleep(_POLL_S)

    def _check(self, endpoints: StoreEndpoints, attempt: int) -> int:
        """Remove what earlier attempts left, take one sample through the store; return how many were removed."""
        from disagg_core.store import MooncakeFeatureStore, round_trip

        section = self._plan.spec.store
        with MooncakeFeatureStore(
            endpoints,
            namespace=f"{self._plan.run_id}/{attempt}",
            host=get_settings().host,
            protocol=section.protocol,
            checksum=section.checksum,
            put_timeout_s=min(section.put_timeout_s, _CHECK_S),
        ) as store:
            swept = store.sweep(f"{self._plan.run_id}/")
            round_trip(store)
        return swept


@contextlib.asynccontextmanager
async def feature_store_services(plan: RunPlan) -> AsyncIterator[FeatureStoreServices]:
    """Hold the run's store services; what was started is stopped at the end, however it comes."""
    services = FeatureStoreServices(plan)
    try:
        yield services
    finally:
        services.stop()


@task(name="feature-store", task_run_name="feature store, attempt {attempt}", cache_policy=NO_CACHE)
async def ready_store(services: FeatureStoreServices, attempt: int) -> StoreEndpoints:
    """Return the endpoints of the run's store for an attempt, as `FeatureStoreServices.ready` does."""
    return await services.ready(attempt)


async def sweep(plan: RunPlan, endpoints: StoreEndpoints, prefix: str) -> int:
    """Remove every sample below `prefix` from the store and return how many there were."""
    from disagg_core.store import MooncakeFeatureStore

    def remove() -> int:
        with MooncakeFeatureStore(endpoints, namespace=plan.run_id, host=get_settings().host) as store:
            return store.sweep(prefix)

    return await asyncio.to_thread(remove)
