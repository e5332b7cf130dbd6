"""The feature store of a run: started before the first attempt, checked before each, torn down last."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from disagg_core.errors import StoreError
from disagg_core.run.plan import RunPlan
from disagg_core.settings import get_settings
from disagg_core.store import StoreServices, probe_store, running_store
from disagg_core.store.endpoints import StoreEndpoints


class FeatureStoreServices:
    """Master and owner of a run's store: ours (managed), or somebody else's that we only check (external)."""

    def __init__(self, plan: RunPlan) -> None:
        self._plan = plan
        self._running = contextlib.ExitStack()
        self._endpoints: StoreEndpoints | None = None
        self._managed: StoreServices | None = None

    async def ready(self, attempt: int) -> StoreEndpoints:
        """Return the endpoints of a store that answers and has room; start a managed one anew if it was lost."""
        if self._endpoints is not None:
            try:
                self.require_alive()  # the master counts on an owner that was killed for a minute more
                await asyncio.to_thread(probe_store, self._endpoints, self._plan.store_capacity)
            except StoreError as error:
                get_run_logger().warning("the feature store was lost and is started anew: %s", error)
                self.stop()
        if self._endpoints is None:
            self._endpoints = await asyncio.to_thread(self._start, attempt)  # faulting memory in may take minutes
        swept = await sweep(self._plan, self._endpoints, f"{self._plan.run_id}/")
        if swept:
            get_run_logger().warning("removed %d samples that an earlier attempt left behind", swept)
        return self._endpoints

    def require_alive(self) -> None:
        """Raise `StoreUnavailable`, if a process of a managed store has ended; an external one is not ours."""
        if self._managed is not None:
            self._managed.require_alive()

    def _start(self, attempt: int) -> StoreEndpoints:
        store = self._plan.spec.store
        if store.mode == "external":
            endpoints = StoreEndpoints(
                master_address=store.master_address or "", metrics_address=store.metrics_address or ""
            )
            probe_store(endpoints, self._plan.store_capacity)
            return endpoints
        self._managed = self._running.enter_context(
            running_store(
                self._plan.store_capacity,
                host=get_settings().host,
                log_dir=self._plan.dir.attempt(attempt).logs,
                protocol=store.protocol,
            )
        )
        return self._managed.endpoints

    def stop(self) -> None:
        """Stop what we started."""
        self._endpoints = self._managed = None
        self._running.close()


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
