"""The parent flow: one flow run is one training run of a draft model, from a live target. Pool ``orchestrator``."""

from __future__ import annotations

import time

from prefect import State, flow, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterParentFlowRunId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import TERMINAL_STATES, FlowRun, StateType
from prefect.flows import Flow
from prefect.logging import get_run_logger
from prefect.runtime import flow_run as runtime
from prefect.states import Cancelling

from disagg_core.attempts import AttemptLoop
from disagg_core.plan import RoleAssignment
from disagg_core.report import RunReport
from disagg_core.run_spec import RunSpec
from tasks.archive import archive_run
from tasks.completion import verify_completion
from tasks.evaluation import evaluate_draft
from tasks.mooncake import feature_store_services
from tasks.preflight import preflight
from tasks.reporting import assemble_report, emit, publish_report
from tasks.roles import run_roles


async def cancel_children(_flow: Flow[..., object], run: FlowRun, state: State[object]) -> None:
    """Cancel every unfinished role of a parent that ended badly: GPUs must not run on for nobody."""
    async with get_client() as client:
        children = await client.read_flow_runs(
            flow_run_filter=FlowRunFilter(
                parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[run.id]),
                state=FlowRunFilterState(type=FlowRunFilterStateType(not_any_=list(TERMINAL_STATES))),
            )
        )
        for child in children:
            if child.state and child.state.type is not StateType.CANCELLING:
                await client.set_flow_run_state(child.id, Cancelling(message=f"the parent ended as {state.name}"))


@flow(
    name="online-disagg-training",
    flow_run_name="{spec.run.name}",
    on_failure=[cancel_children],
    on_crashed=[cancel_children],
    on_cancellation=[cancel_children],
)
async def online_disagg_training(spec: RunSpec) -> RunReport:
    """Train a draft model from a live target. One flow run is one training run."""
    began = time.time()
    plan = preflight(spec)
    emit(plan, "started", prompts=plan.total_prompts)
    attempts = AttemptLoop(limit=spec.run.attempts, first=plan.next_attempt())
    async with feature_store_services(plan) as store:
        while (attempt := attempts.next()) is not None:
            endpoints = await store.ready(attempt)
            outcome, roles = await run_roles(RoleAssignment(plan=plan, attempt=attempt, store=endpoints))
            attempts.record(outcome)
            if not outcome.finished:
                get_run_logger().warning("attempt %d did not finish: %s", attempt, outcome)
                emit(
                    plan, "attempt-failed", attempt=attempt, failure_class=outcome.failure_class, reason=outcome.reason
                )
        completion = await verify_completion(plan, attempts.outcomes[-1].attempt, endpoints, roles)
    evaluation = await evaluate_draft(plan, completion)
    archive = archive_run(plan, completion)
    emit(plan, "archived", url=archive.url)
    report = assemble_report(
        plan, attempts.outcomes, roles, completion, evaluation, archive, str(runtime.id), time.time() - began
    )
    emit(plan, "completed", accept_length=evaluation.accept_length_after if evaluation else None)
    return publish_report(plan, report)
