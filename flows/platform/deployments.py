"""Work pools, deployments and the zombie automation: one table, registered on any Prefect server.

``infra/prefect.yaml`` says the same for ``prefect deploy --all``, and a test compares what the two leave on a server.
"""

from __future__ import annotations

import asyncio
import contextlib
from copy import deepcopy
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
from prefect import State, get_client
from prefect.automations import Automation, EventTrigger, Posture, ResourceSpecification
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import ConcurrencyLimitConfig, FlowRun, StateType
from prefect.deployments.runner import RunnerDeployment
from prefect.events.actions import ChangeFlowRunState
from prefect.exceptions import ObjectAlreadyExists
from prefect.flows import Flow
from prefect.states import Crashed
from prefect.types.entrypoint import EntrypointType
from prefect.workers.process import ProcessWorker
from pydantic import ValidationError

from disagg_core.run.known import OtherVersion
from disagg_core.run_spec.document import PoolsSection
from disagg_core.run_spec.yaml_file import load_spec
from disagg_core.settings import CHECKOUT
from flows.draft_evaluation import draft_evaluation
from flows.online_disagg_training import online_disagg_training, report_interruption
from flows.platform.workers import worker_name
from flows.rollout_producer import rollout_producer
from flows.train_consumer import train_consumer
from tasks.cancellation import cancel_unfinished
from tasks.heartbeat import HEARTBEAT_ENVIRONMENT, HEARTBEAT_WINDOW_S
from tasks.run_slot import ensure_slots, release_slot

ZOMBIE_AUTOMATION = "draftline: crash runs without heartbeat"
TRAINING = "local"
"""Name of the deployment that trains: ``prefect deployment run online-disagg-training/local``."""
TAG = "draftline"
"""The tag of every deployment of ours, and so of every flow run of theirs."""
_ENDS = ("Completed", "Failed", "Cancelled", "Crashed")


@dataclass(frozen=True)
class Deployment:
    """What a work pool is to run, and under which name: ``<flow>/<name>``. All runs beat at our rate.

    Of more than `concurrency_limit` runs at once, the later ones wait.
    """

    flow: Flow[..., Any]
    name: str
    pool: str
    tags: tuple[str, ...]
    description: str | None = None
    concurrency_limit: int | None = None


def deployments(pools: PoolsSection) -> list[Deployment]:
    """Return all deployments. Those of the roles have the names of their pools, by which the parent finds them."""
    return [
        Deployment(
            online_disagg_training,
            TRAINING,
            pools.orchestrator,
            (TAG,),
            description="One run is one training of a draft model; the spec is its one parameter.",
            concurrency_limit=1,
        ),
        Deployment(rollout_producer, pools.rollout, pools.rollout, (TAG, "gpu", "role:producer")),
        Deployment(draft_evaluation, pools.rollout, pools.rollout, (TAG, "gpu", "role:evaluation")),
        Deployment(train_consumer, pools.train, pools.train, (TAG, "gpu", "role:consumer")),
    ]


def register() -> None:
    """Create or update pools, their slots, deployments and the automation on the server in PREFECT_API_URL."""
    asyncio.run(register_all(PoolsSection()))


async def register_all(pools: PoolsSection) -> None:
    """Create or update everything on the server in PREFECT_API_URL, for these pools."""
    async with get_client() as client:
        for pool in (pools.orchestrator, pools.rollout, pools.train):
            await _ensure_pool(client, pool)
        await ensure_slots(client, pools)
        await _ensure_zombie_automation(client)
    for deployment in deployments(pools):
        await _deploy(deployment)


async def _ensure_pool(client: PrefectClient, name: str) -> None:
    """Create the pool; in the template of one that is there, runs must not write to their worker either."""
    try:
        await client.create_work_pool(WorkPoolCreate(name=name, type="process", base_job_template=_job_template()))
    except ObjectAlreadyExists:
        pool = await client.read_work_pool(name)
        template = deepcopy(pool.base_job_template)
        streams = template.get("variables", {}).get("properties", {}).get("stream_output")
        if pool.type == "process" and streams and streams.get("default"):
            streams["default"] = False
            await client.update_work_pool(name, WorkPoolUpdate(base_job_template=template))


def _job_template() -> dict[str, Any]:
    """Return the process worker's template for runs that do not write to their worker: its death would end them.

    The next line that they log to a pipe without a reader makes them exit. The server has their logs all the same.
    """
    template = deepcopy(ProcessWorker.get_default_base_job_template())
    template["variables"]["properties"]["stream_output"]["default"] = False
    return template


async def _deploy(deployment: Deployment) -> None:
    limit = deployment.concurrency_limit
    registered = RunnerDeployment.from_flow(
        deployment.flow,
        name=deployment.name,
        description=deployment.description,
        work_pool_name=deployment.pool,
        tags=list(deployment.tags),
        parameters=_demo_parameters() if deployment.flow is online_disagg_training else {},
        concurrency_limit=ConcurrencyLimitConfig(limit=limit, collision_strategy="ENQUEUE") if limit else None,
        job_variables={"env": HEARTBEAT_ENVIRONMENT},
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    await registered.aapply()


def _demo_parameters() -> dict[str, Any]:
    """Return the demo's spec as default parameters where this is a checkout, so that a run needs no arguments."""
    demo = CHECKOUT / "infra" / "runs" / "demo.yaml"
    return {"spec": load_spec(demo).model_dump(mode="json")} if demo.is_file() else {}


def zombie_automation() -> Automation:
    """Return the automation that marks our runs as crashed when their process is gone.

    The events of a flow run name its tags as related resources; other people's runs, which may beat at another rate,
    are none of its business.
    """
    return Automation(
        name=ZOMBIE_AUTOMATION,
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", *(f"prefect.flow-run.{end}" for end in _ENDS)},
            match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
            match_related=ResourceSpecification({"prefect.resource.id": f"prefect.tag.{TAG}"}),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=HEARTBEAT_WINDOW_S),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED, message=f"no heartbeat for {HEARTBEAT_WINDOW_S} s: its process is gone"
            )
        ],
    )


async def _ensure_zombie_automation(client: PrefectClient) -> None:
    """Create the automation, or bring one of another version up to date; it stays off where somebody disabled it."""
    wanted = zombie_automation()
    known = await client.read_automations_by_name(ZOMBIE_AUTOMATION)
    if not known:
        await wanted.acreate()
    for automation in known:
        if (automation.trigger, automation.actions) != (wanted.trigger, wanted.actions):
            await client.update_automation(automation.id, wanted.model_copy(update={"enabled": automation.enabled}))


def cancel_active_runs(timeout_s: float) -> int:
    """Cancel our unfinished flow runs, wait up to `timeout_s` for their end, and return how many there were."""
    return asyncio.run(_cancel_active_runs(timeout_s))


async def _cancel_active_runs(timeout_s: float) -> int:
    async with get_client() as client:
        ours = FlowRunFilterTags(all_=[TAG])
        return len(await cancel_unfinished(client, "draftline down", wait_s=timeout_s, tags=ours))


def crash_leftovers() -> int:
    """Mark the runs of an earlier platform whose process is gone as crashed, and return how many there were.

    A server that was killed remembers them as running: the next run would wait for their slot until its lease ends.
    """
    return asyncio.run(_crash_leftovers(PoolsSection()))


async def _crash_leftovers(pools: PoolsSection) -> int:
    begun = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
    begun_runs = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=begun)))
    ours = {worker_name(pool) for pool in (pools.orchestrator, pools.rollout, pools.train)}
    async with get_client() as client:
        found = await client.read_flow_runs(flow_run_filter=begun_runs)
        leftovers = [run for run in found if run.labels.get("prefect.worker.name") in ours and not _lives(run)]
        for run in leftovers:
            state: State[Any] = Crashed(message="its process ended together with the platform")
            await client.set_flow_run_state(run.id, state, force=True)
            if "spec" in run.parameters:
                await release_slot(client, run.id)
                with contextlib.suppress(ValidationError, OtherVersion):
                    report_interruption(online_disagg_training, run, state)
    return len(leftovers)


def _lives(run: FlowRun) -> bool:
    """Tell whether the process of a run of this machine is alive."""
    try:
        environment: dict[str, str] = psutil.Process(int(run.infrastructure_pid or 0)).environ()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False
    return environment.get("PREFECT__FLOW_RUN_ID") == str(run.id)
