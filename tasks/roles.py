"""The two roles of an attempt, side by side on their work pools: started, watched, and stopped together.

A role run that ended badly is never an exception here but a `RoleRun` that says how it ended: the attempt is judged
by both roles, by the outcome files they leave, and by the stream between them.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from datetime import datetime
from typing import Literal
from uuid import UUID

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from pydantic import BaseModel, ConfigDict

from disagg_core.errors import FailureClass, StoreError
from disagg_core.files import write_atomically
from disagg_core.run.attempts import AttemptOutcome
from disagg_core.run.outcomes import EARLY_STOP, MAX_STEPS, RoleOutcome, read_outcome
from disagg_core.run.plan import RoleAssignment
from tasks.children import Supervision, run_child, state_name

Role = Literal["producer", "consumer"]

_STORE_POLL_S = 1.0


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

    @property
    def died(self) -> bool:
        """Whether its process was killed before it could say how it ended."""
        return not self.completed and (self.outcome is None or self.outcome.died)

    @property
    def stopped(self) -> bool:
        """Whether it ended because it was asked to, and not by a failure of its own that came before."""
        failed_before = self.outcome is not None and self.outcome.failure_class not in (None, "preempted")
        return self.state == "Cancelled" and not failed_before


async def run_roles(
    assignment: RoleAssignment, require_store: Callable[[], None]
) -> tuple[AttemptOutcome, dict[Role, RoleRun]]:
    """Run producer and consumer at the same time until both have ended; say how the attempt ended.

    Both are stopped when `require_store`, which is called every second, raises a `StoreError`: on their own they would
    try again for half a minute.
    """
    hand_over_cursor(assignment)
    supervision = Supervision()
    producer = asyncio.create_task(run_producer(assignment, supervision))
    consumer = asyncio.create_task(run_consumer(assignment, supervision))
    store_watch = asyncio.create_task(watch_store(require_store, supervision))
    try:
        runs: dict[Role, RoleRun] = {"producer": await producer, "consumer": await consumer}
    finally:
        store_watch.cancel()
        supervision.request_stop("the parent is ending")
        await asyncio.gather(producer, consumer, return_exceptions=True)
    if supervision.failure_class is not None:
        return AttemptOutcome(assignment.attempt, supervision.failure_class, supervision.reason), runs
    return judge(assignment.attempt, runs["producer"], runs["consumer"]), runs


async def watch_store(require_store: Callable[[], None], supervision: Supervision) -> None:
    """Stop the attempt as soon as `require_store` raises a `StoreError`."""
    while True:
        try:
            require_store()
        except StoreError as error:
            get_run_logger().error("the feature store was lost, the attempt ends: %s", error)
            supervision.request_stop(str(error), error.failure_class)
            return
        await asyncio.sleep(_STORE_POLL_S)


def hand_over_cursor(assignment: RoleAssignment) -> None:
    """Tell the producer of a later attempt which samples the newest checkpoint covers: they are not captured again."""
    if assignment.attempt == 1:
        return
    from disagg_core.training.checkpoint import covered_ordinals

    covered = covered_ordinals(assignment.plan.dir.checkpoints)
    write_atomically(assignment.dir.state / "skip.json", json.dumps(covered.ranges()))


def judge(attempt: int, producer: RoleRun, consumer: RoleRun) -> AttemptOutcome:
    """Decide how an attempt ended from the ends of its two roles.

    The first cause counts: a consumer that fails because the producer failed reports the producer's class, and a role
    that was cancelled because the other failed is not the cause, unless it had failed and was slow to end.
    """
    if producer.completed and consumer.completed:
        result = consumer.outcome.result if consumer.outcome else {}
        # When no further step is to be taken nobody would train on what was lost: another attempt is for nothing.
        lost = result.get("lost", 0) if result.get("reason") not in (MAX_STEPS, EARLY_STOP) else 0
        return AttemptOutcome(attempt=attempt, incomplete=lost if isinstance(lost, int) else 0)
    culprit = next(
        (run for run in (consumer, producer) if not run.completed and not run.stopped),
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
    """Run the rollout producer on its pool; restart it inside the attempt when it dies without an outcome."""
    allowed = assignment.plan.spec.orchestration.producer_restarts
    restarts = 0
    while True:
        run = await _run_role("producer", assignment, supervision, restarts=restarts)
        if not run.died or supervision.stop.is_set() or restarts >= allowed:
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
    runs = await asyncio.gather(*(_run_role("consumer", assignment, supervision, node=rank) for rank in range(nodes)))
    failed = [run for run in runs if not run.completed]
    if failed:
        supervision.request_stop(f"the consumer ended as {failed[0].state}")
    return failed[0] if failed else runs[0]


async def _run_role(
    role: Role,
    assignment: RoleAssignment,
    supervision: Supervision,
    *,
    restarts: int = 0,
    node: int = 0,
) -> RoleRun:
    spec = assignment.plan.spec
    pool = spec.orchestration.pools.rollout if role == "producer" else spec.orchestration.pools.train
    flow_name = "rollout-producer" if role == "producer" else "train-consumer"
    flow_run = await run_child(
        flow_name,
        pool,
        {"assignment": assignment.model_dump(mode="json"), **({"node_rank": node} if role == "consumer" else {})},
        name=f"{assignment.plan.run_id} {role}, attempt {assignment.attempt}" + (f", node {node}" if node else ""),
        tags=["draftline", f"role:{role}", f"run:{assignment.plan.run_id}", "gpu", *spec.orchestration.tags],
        start_timeout_s=spec.orchestration.stall_timeout_s,
        supervision=supervision,
    )
    if role == "consumer" and flow_run.state and not flow_run.state.is_completed():
        supervision.request_stop(f"the consumer ended as {flow_run.state.name}")
    return RoleRun(
        role=role,
        flow_run_id=flow_run.id,
        work_pool=pool,
        state=state_name(flow_run),
        message=(flow_run.state.message or "") if flow_run.state else "",
        started=flow_run.start_time,
        ended=flow_run.end_time,
        restarts=restarts,
        outcome=read_outcome(assignment.dir.state / f"{role}-outcome.json"),
    )
