"""Work pools that cannot take a run are known before it starts: on a real Prefect server, with workers' heartbeats."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from prefect import get_client
from prefect.client.schemas.actions import WorkPoolUpdate
from prefect.states import Pending

from disagg_core.run_spec.document import RunSpec
from disagg_core.run_spec.yaml_file import load_spec
from tasks.pools import PoolsNotReady, check_pools
from tests.integration.flows.conftest import PrefectServer

pytestmark = pytest.mark.integration

TINY = Path(__file__).resolve().parents[2] / "e2e" / "tiny.yaml"


def a_spec(*overrides: str) -> RunSpec:
    return load_spec(TINY, list(overrides))


def faults(spec: RunSpec, **options: bool) -> list[str]:
    try:
        check_pools(spec, timeout_s=0.5, **options)
    except PoolsNotReady as error:
        return str(error).split("; ")
    return []


@pytest.fixture
def pools(registered: PrefectServer) -> Iterator[None]:
    """Our pools and deployments, with a worker of each that says it is there."""
    with get_client(sync_client=True) as client:
        for pool in ("gpu-rollout", "gpu-train"):
            client.send_worker_heartbeat(work_pool_name=pool, worker_name="w", heartbeat_interval_seconds=30)
        yield
        for pool in ("gpu-rollout", "gpu-train"):
            client.update_work_pool(pool, WorkPoolUpdate(is_paused=False, concurrency_limit=None))


def set_pool(name: str, **values: object) -> None:
    with get_client(sync_client=True) as client:
        client.update_work_pool(name, WorkPoolUpdate(**values))


def test_a_run_finds_its_workers(pools: None) -> None:
    assert faults(a_spec()) == []


def test_pools_without_workers_and_deployments_are_all_named(pools: None) -> None:
    other = f"other-{uuid4().hex[:6]}"
    found = "; ".join(faults(a_spec(f"orchestration.pools.rollout={other}")))
    assert f"there is no work pool {other}" in found
    assert f"there is no deployment rollout-producer/{other}" in found
    assert f"there is no deployment draft-evaluation/{other}" in found
    assert "gpu-train" not in found

    found = "; ".join(faults(a_spec("orchestration.pools.train=orchestrator")))
    assert "the work pool orchestrator has no worker online" in found
    assert "prefect worker start --pool orchestrator" in found


def test_a_pool_that_is_paused_or_too_small_is_named(pools: None) -> None:
    set_pool("gpu-train", is_paused=True)
    set_pool("gpu-rollout", concurrency_limit=0)
    found = "; ".join(faults(a_spec()))
    assert "the work pool gpu-rollout has 0 of 0 slots free, this run needs 1 at once" in found
    assert "the work pool gpu-train is paused" in found
    set_pool("gpu-train", is_paused=False, concurrency_limit=1)
    set_pool("gpu-rollout", concurrency_limit=1)
    assert faults(a_spec()) == []
    assert "1 of 1 slots free, this run needs 2 at once" in faults(a_spec("training.nodes=2"))[0]


def test_a_slot_that_another_run_holds_is_not_free(pools: None) -> None:
    set_pool("orchestrator", concurrency_limit=2)

    async def held() -> None:
        async with get_client() as client:
            deployment = await client.read_deployment_by_name("online-disagg-training/local")
            run = await client.create_flow_run_from_deployment(deployment.id)
            await client.set_flow_run_state(run.id, Pending(), force=True)

    spec = a_spec("orchestration.pools.train=orchestrator", "training.nodes=2")
    assert "slots free" not in "; ".join(faults(spec))
    asyncio.run(held())
    assert "the work pool orchestrator has 1 of 2 slots free, this run needs 2 at once" in "; ".join(faults(spec))
    assert faults(spec, trained=True) == [], "the evaluation does not need it"
    assert "slots free" not in "; ".join(faults(spec, in_turn=False)), "a run waits for its turn with nothing held"
    set_pool("orchestrator", concurrency_limit=None)
