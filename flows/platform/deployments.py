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
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.flows import Flow
from prefect.schedules import Cron
from prefect.states import Crashed
from prefect.types.entrypoint import EntrypointType
from prefect.workers.process import ProcessWorker
from pydantic import ValidationError

from disagg_core.run.known import OtherVersion
from disagg_core.run_spec.document import PoolsSection, RunSpec
from disagg_core.run_spec.yaml_file import load_spec
from disagg_core.settings import CHECKOUT
from flows.draft_evaluation import draft_evaluation
from flows.draft_watch import draft_watch
from flows.online_disagg_training import online_disagg_training, report_interruption
from flows.platform.recurring import ensure_notifications, ensure_triggers
from flows.platform.workers import worker_name
from flows.rollout_producer import rollout_producer
from flows.train_consumer import train_consumer
from tasks.cancellation import cancel_unfinished
from tasks.heartbeat import HEARTBEAT_ENVIRONMENT, HEARTBEAT_WINDOW_S
from tasks.run_slot import ensure_slots, release_slot

ZOMBIE_AUTOMATION = "draftline: crash runs without heartbeat"
TRAINING = "local"
"""Name of the deployment that trains: ``prefect deployment run online-disagg-training/local``."""
NIGHTLY, ON_DEMAND, WATCH = "nightly", "on-demand", "watch"
"""Names of the deployments of recurring training: by the clock, by events, and what emits these."""
CRON = "0 22 * * *"
_CLOCK = "clock"
"""What our schedules are called on their deployments, so that another registration finds them."""
_WATCH_CRON = "*/15 * * * *"
TAG = "draftline"
"""The tag of every deployment of ours, and so of every flow run of theirs."""
_ENDS = ("Completed", "Failed", "Cancelled", "Crashed", "Suspended", "Promoted", "Rejected", "Skipped")
"""States that a run beats no more in; the events of a flow run have the names of its states."""


@dataclass(frozen=True)
class Deployment:
    """What a work pool is to run, and under which name: ``<flow>/<name>``. All runs beat at our rate.

    Of more than `concurrency_limit` runs at once, the later ones wait. `document` is the run document in infra/runs
    that stands in its parameters until somebody gives another; what was given, and whether the schedule `cron` is on,
    outlasts another registration.
    """

    flow: Flow[..., Any]
    name: str
    pool: str
    tags: tuple[str, ...]
    description: str | None = None
    concurrency_limit: int | None = None
    document: str | None = None
    cron: str | None = None

    @property
    def full_name(self) -> str:
        """The name on the server."""
        return f"{self.flow.name}/{self.name}"


@dataclass(frozen=True)
class Nightly:
    """What recurring training does, and when."""

    spec: RunSpec
    cron: str = CRON


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
            document="demo.yaml",
        ),
        Deployment(
            online_disagg_training,
            NIGHTLY,
            pools.orchestrator,
            (TAG,),
            description="Recurring training: goes on from the champion on what is new. Its schedule is off at first.",
            concurrency_limit=1,
            document="nightly.yaml",
            cron=CRON,
        ),
        Deployment(
            online_disagg_training,
            ON_DEMAND,
            pools.orchestrator,
            (TAG,),
            description="Recurring training, started by the events draftline.target.changed, data.arrived and "
            "accept_length.dropped.",
            concurrency_limit=1,
            document="nightly.yaml",
        ),
        Deployment(
            draft_watch,
            WATCH,
            pools.orchestrator,
            (TAG,),
            description="Looks at the target, at the data and at a server that serves the champion, and emits what it "
            "sees. Its schedule is off at first.",
            concurrency_limit=1,
            document="nightly.yaml",
            cron=_WATCH_CRON,
        ),
        Deployment(rollout_producer, pools.rollout, pools.rollout, (TAG, "gpu", "role:producer")),
        Deployment(draft_evaluation, pools.rollout, pools.rollout, (TAG, "gpu", "role:evaluation")),
        Deployment(train_consumer, pools.train, pools.train, (TAG, "gpu", "role:consumer")),
    ]


def register(nightly: Nightly | None = None, notify: str | None = None) -> None:
    """Create or update pools, their slots, deployments and automations on the server in PREFECT_API_URL.

    `nightly` is what recurring training is to do from now on; `notify` is a notification block, ``slug/name``, that
    tells how its runs end.

    Raises:
        BadInput: there is no such block.
    """
    asyncio.run(register_all(PoolsSection(), nightly, notify))


async def register_all(pools: PoolsSection, nightly: Nightly | None = None, notify: str | None = None) -> None:
    """Create or update everything on the server in PREFECT_API_URL, for these pools; see `register`."""
    if notify is not None:  # first: whoever names a block that is not there finds nothing changed
        await ensure_notifications(notify)
    async with get_client() as client:
        for pool in (pools.orchestrator, pools.rollout, pools.train):
            await _ensure_pool(client, pool)
        await ensure_slots(client, pools)
        await _ensure_zombie_automation(client)
    for deployment in deployments(pools):  # one by one: SQLite makes those wait long that write at once
        await _deploy(deployment, nightly)
    async with get_client() as client:
        on_demand = await client.read_deployment_by_name(f"{online_disagg_training.name}/{ON_DEMAND}")
    await ensure_triggers(on_demand.id)


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


async def _deploy(deployment: Deployment, nightly: Nightly | None) -> None:
    limit = deployment.concurrency_limit
    parameters = _parameters_of(deployment.document)
    schedule = Cron(deployment.cron, active=False, slug=_CLOCK) if deployment.cron else None
    if deployment.name in (NIGHTLY, ON_DEMAND, WATCH):
        given = await _given(deployment)
        if nightly is not None:
            parameters = {**given, "spec": nightly.spec.model_dump(mode="json")}
            schedule = Cron(nightly.cron, slug=_CLOCK) if deployment.name == NIGHTLY else schedule
        elif given:
            parameters, schedule = given, None
    registered = RunnerDeployment.from_flow(
        deployment.flow,
        name=deployment.name,
        description=deployment.description,
        work_pool_name=deployment.pool,
        tags=list(deployment.tags),
        parameters=parameters,
        schedule=schedule,
        concurrency_limit=ConcurrencyLimitConfig(limit=limit, collision_strategy="ENQUEUE") if limit else None,
        job_variables={"env": HEARTBEAT_ENVIRONMENT},
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    await registered.aapply()


async def _given(deployment: Deployment) -> dict[str, Any]:
    """Return the parameters that a deployment has on the server; none if it is not there."""
    async with get_client() as client:
        try:
            return dict((await client.read_deployment_by_name(deployment.full_name)).parameters)
        except ObjectNotFound:
            return {}


def _parameters_of(document: str | None) -> dict[str, Any]:
    """Return a spec as default parameters where this is a checkout, so that a run needs no arguments."""
    path = CHECKOUT / "infra" / "runs" / document if document else None
    return {"spec": load_spec(path).model_dump(mode="json")} if path is not None and path.is_file() else {}


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
