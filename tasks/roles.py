"""The two roles of an attempt, side by side on their work pools: started, watched, and stopped together.

A role run that ended badly is never an exception here but a `RoleRun` that says how it ended: the attempt is judged
by both roles, by the outcome files they leave, and by the stream between them.
"""

from __future__ import annotations

import asyncio
import json
from datetime import datetime
from typing import Literal
from uuid import UUID

import httpx
from prefect import get_client, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import arun_deployment
from prefect.logging import get_run_logger
from prefect.states import Cancelled, Cancelling
from pydantic import BaseModel, ConfigDict

from disagg_core.attempts import AttemptOutcome
from disagg_core.errors import FailureClass
from disagg_core.ordinals import OrdinalSet
from disagg_core.outcomes import RoleOutcome, read_outcome
from disagg_core.plan import RoleAssignment
from disagg_core.run_dir import write_atomically

Role = Literal["producer", "consumer"]

_POLL_S = 1.0
_SERVER_AWAY_S = 60.0
_STOP_S = 60.0


class RoleRun(BaseModel):
    """One role of an attempt, as its last flow run ended."""

    model_config = ConfigDict(frozen=True)

    role: Role
    flow_run_id: UUID
    work_pool: str
    state: str
    message: str
    started: datetime | None
    ended: datetime | None
    restarts: int = 0
    outcome: RoleOutcome | None = None

    @property
    def completed(self) -> bool:
        """Whether the role did all its work."""
        return self.state == "Completed"


class Supervision:
    """What the two watchers of an attempt tell each other: the order to stop, and why."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.reason = ""
        self.failure_class: FailureClass | None = None

    def request_stop(self, reason: str, failure_class: FailureClass | None = None) -> None:
        """Ask both watchers to cancel their role; the first reason counts.

        `failure_class` is given where the attempt's failure is the watchers' own finding and no role's.
        """
        if not self.stop.is_set():
            self.reason, self.failure_class = reason, failure_class
            self.stop.set()


async def run_roles(assignment: RoleAssignment) -> tuple[AttemptOutcome, dict[Role, RoleRun]]:
    """Run producer and consumer at the same time until both have ended; say how the attempt ended."""
    hand_over_cursor(assignment)
    supervision = Supervision()
    producer = asyncio.create_task(run_producer(assignment, supervision))
    consumer = asyncio.create_task(run_consumer(assignment, supervision))
    try:
        runs: dict[Role, RoleRun] = {"producer": await producer, "consumer": await consumer}
    finally:
        supervision.request_stop("the parent is ending")
        await asyncio.gather(producer, consumer, return_exceptions=True)
    if supervision.failure_class is not None:
        return AttemptOutcome(assignment.attempt, supervision.failure_class, supervision.reason), runs
    return judge(assignment.attempt, runs["producer"], runs["consumer"]), runs


def hand_over_cursor(assignment: RoleAssignment) -> None:
    """Tell the producer of a later attempt which samples the newest checkpoint covers: they are not captured again."""
    if assignment.attempt == 1:
        return
    from disagg_core.training.checkpoint import newest_complete, read_state

    newest = newest_complete(assignment.plan.dir.checkpoints)
    cursor = read_state(newest).cursor if newest else None
    covered = OrdinalSet([*cursor.trained, *cursor.quarantined] if cursor else ())
    write_atomically(assignment.dir.state / "skip.json", json.dumps(covered.ranges()))


def judge(attempt: int, producer: RoleRun, consumer: RoleRun) -> AttemptOutcome:
    """Decide how an attempt ended from the ends of its two roles.

    The first cause counts: a consumer that fails because the producer failed reports the producer's class, and a
    producer that was cancelled because the consumer failed is not the cause.
    """
    if producer.completed and consumer.completed:
        lost = consumer.outcome.result.get("lost", 0) if consumer.outcome else 0
        return AttemptOutcome(attempt=attempt, incomplete=lost if isinstance(lost, int) else 0)
    culprit = next(
        (run for run in (consumer, producer) if not run.completed and run.state != "Cancelled"),
        consumer if not consumer.completed else producer,
    )
    failure_class: FailureClass = "preempted" if culprit.state in {"Crashed", "Cancelled"} else "bug"
    reason = culprit.message
    if culprit.outcome is not None and culprit.outcome.state == "failed":
        failure_class = culprit.outcome.failure_class or "bug"
        reason = culprit.outcome.message
    return AttemptOutcome(attempt=attempt, failure_class=failure_class, reason=f"{culprit.role}: {reason}")


@task(name="run-producer", task_run_name="producer, attempt {assignment.attempt}", cache_policy=NO_CACHE)
async def run_producer(assignment: RoleAssignment, supervision: Supervision) -> RoleRun:
    """Run the rollout producer on its pool; restart it inside the attempt when it dies without a word."""
    allowed = assignment.plan.spec.orchestration.producer_restarts
    restarts = 0
    while True:
        run = await _run_role("producer", assignment, supervision, restarts)
        died = not run.completed and run.outcome is None and not supervision.stop.is_set()
        if not died or restarts >= allowed:
            break
        restarts += 1
        get_run_logger().warning(
            "the producer died (%s); restart %d of %d continues the stream", run.message, restarts, allowed
        )
    if not run.completed:
        supervision.request_stop(f"the producer ended as {run.state}")
    return run


@task(name="run-consumer", task_run_name="consumer, attempt {assignment.attempt}", cache_policy=NO_CACHE)
async def run_consumer(assignment: RoleAssignment, supervision: Supervision) -> RoleRun:
    """Run the training consumer on its pool, one flow run for each training node."""
    nodes = assignment.plan.spec.training.nodes
    runs = await asyncio.gather(
        *(_run_role("consumer", assignment, supervision, 0, {"node_rank": rank}) for rank in range(nodes))
    )
    failed = [run for run in runs if not run.completed]
    if failed:
        supervision.request_stop(f"the consumer ended as {failed[0].state}")
    return failed[0] if failed else runs[0]


async def _run_role(
    role: Role,
    assignment: RoleAssignment,
    supervision: Supervision,
    restarts: int,
    parameters: dict[str, int] | None = None,
) -> RoleRun:
    spec = assignment.plan.spec
    pool = spec.orchestration.pools.rollout if role == "producer" else spec.orchestration.pools.train
    flow_name = "rollout-producer" if role == "producer" else "train-consumer"
    started = await arun_deployment(
        f"{flow_name}/{pool}",
        parameters={"assignment": assignment.model_dump(mode="json"), **(parameters or {})},
        timeout=0,
        as_subflow=True,
        tags=["draftline", f"role:{role}", f"run:{assignment.plan.run_id}", "gpu", *spec.orchestration.tags],
    )
    async with get_client() as client:
        flow_run = await _watch(client, started.id, pool, supervision, spec.orchestration.stall_timeout_s)
    if role == "consumer" and flow_run.state and not flow_run.state.is_completed():
        supervision.request_stop(f"the consumer ended as {flow_run.state.name}")
    return RoleRun(
        role=role,
        flow_run_id=flow_run.id,
        work_pool=pool,
        state=_state_name(flow_run),
        message=(flow_run.state.message or "") if flow_run.state else "",
        started=flow_run.start_time,
        ended=flow_run.end_time,
        restarts=restarts,
        outcome=read_outcome(assignment.dir.state / f"{role}-outcome.json"),
    )


def _state_name(flow_run: FlowRun) -> str:
    return flow_run.state.type.value.capitalize() if flow_run.state else "Unknown"


async def _watch(
    client: PrefectClient, run_id: UUID, pool: str, supervision: Supervision, start_timeout_s: float
) -> FlowRun:
    """Follow a flow run to its end; cancel it when the attempt is to stop, or when no worker takes it in time."""
    waited = 0.0
    while True:
        flow_run = await _read(client, run_id)
        if flow_run.state and flow_run.state.is_final():
            return flow_run
        if supervision.stop.is_set():
            return await _cancel(client, run_id, supervision.reason)
        if flow_run.start_time is None and waited > start_timeout_s:
            supervision.request_stop(
                f"no worker of pool {pool} started its run in {start_timeout_s:.0f} s "
                "(orchestration.stall_timeout_s); start one: prefect worker start --pool " + pool,
                "stalled",
            )
            continue
        await asyncio.sleep(_POLL_S)
        waited += _POLL_S


async def _cancel(client: PrefectClient, run_id: UUID, reason: str) -> FlowRun:
    """Cancel a flow run and wait, bounded, until it has ended."""
    flow_run = await _read(client, run_id)
    for waited in range(int(_STOP_S / _POLL_S)):
        if flow_run.state and flow_run.state.is_final():
            return flow_run
        if waited == 0:
            running = flow_run.start_time is not None
            await client.set_flow_run_state(
                run_id, Cancelling(message=reason) if running else Cancelled(message=reason)
            )
        await asyncio.sleep(_POLL_S)
        flow_run = await _read(client, run_id)
    await client.set_flow_run_state(run_id, Cancelled(message=f"{reason}; did not end in {_STOP_S:.0f} s"), force=True)
    return await _read(client, run_id)


async def _read(client: PrefectClient, run_id: UUID) -> FlowRun:
    """Read a flow run; ride out a server that is away for up to a minute."""
    deadline = asyncio.get_running_loop().time() + _SERVER_AWAY_S
    while True:
        try:
            return await client.read_flow_run(run_id)
        except (httpx.TransportError, httpx.HTTPStatusError) as error:
            refused = isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500
            if refused or asyncio.get_running_loop().time() > deadline:
                raise
            await asyncio.sleep(_POLL_S)
