"""The parent flow: one flow run is one training run of a draft model, from a live target. Pool ``orchestrator``."""

from __future__ import annotations

from typing import Any

from prefect import State, flow, get_client
from prefect.client.schemas.filters import FlowRunFilterParentFlowRunId
from prefect.client.schemas.objects import FlowRun
from prefect.flows import Flow
from prefect.runtime import flow_run as runtime
from prefect.states import Completed

from disagg_core.report.document import EndState, RunReport
from disagg_core.run.directory import RunDir
from disagg_core.run.plan import RunPlan, run_id_of
from disagg_core.run_spec.document import RunSpec
from disagg_core.settings import get_settings
from tasks.archive import archive_failed_run, archive_report, archive_run, prune_archives
from tasks.attempts import pause_before_next, run_attempt
from tasks.cancellation import abort_if_over, cancel_unfinished
from tasks.completion import Completion, judge_training, verify_completion
from tasks.evaluation import evaluate_drafts
from tasks.interruption import end_interrupted
from tasks.mooncake import feature_store_services
from tasks.night import what_is_new
from tasks.preflight import preflight
from tasks.promotion import end_of, find_incumbent, judge_run, pass_gate
from tasks.reporting import RunRecord, emit, publish_report
from tasks.run_slot import release_slot, run_slot
from tasks.tracking import track_end, track_evaluations, trackers


async def cancel_children(flow: Flow[..., Any], flow_run: FlowRun, state: State[object]) -> None:
    """Cancel every unfinished role of a parent that ended badly: nobody would use what they still make.

    A worker whose run was killed calls this by keyword: the parameters' names are Prefect's.
    """
    async with get_client() as client:
        children = FlowRunFilterParentFlowRunId(any_=[flow_run.id])
        await cancel_unfinished(client, f"the parent ended as {state.name}", parent_flow_run_id=children)


async def release_slots(flow: Flow[..., Any], flow_run: FlowRun, state: State[object]) -> None:
    """Let the next run begin: this one's process is gone. Called as `cancel_children` is."""
    async with get_client() as client:
        await release_slot(client, flow_run.id)


def report_interruption(flow: Flow[..., Any], flow_run: FlowRun, state: State[object]) -> None:
    """Leave report and archive of a run that was cancelled, or whose process died. Called as `cancel_children` is."""
    spec = RunSpec.model_validate(flow_run.parameters["spec"])
    run_dir = RunDir.of(get_settings().runs_dir, run_id_of(spec, flow_run.id))
    end: EndState = "crashed" if state.is_crashed() else "cancelled"
    end_interrupted(run_dir, end, state.message or state.name or end, str(flow_run.id))


async def train(plan: RunPlan, record: RunRecord) -> Completion:
    """Attempt the training until it is complete, and account for every sample."""
    async with feature_store_services(plan) as store:
        for attempt in record.attempts:
            await pause_before_next(record.attempts)
            outcome, roles = await run_attempt(plan, attempt, store)
            record.attempt_ended(outcome, roles)
            if not outcome.finished:
                emit(plan, "attempt-failed", attempt=attempt, reason=outcome.describe())
        return record.trained(await verify_completion(plan, outcome.attempt, store.endpoints, record.roles))


@flow(
    name="online-disagg-training",
    flow_run_name="{spec.run.name}",
    on_failure=[cancel_children],
    on_crashed=[cancel_children, release_slots, report_interruption],
    on_cancellation=[cancel_children, release_slots, report_interruption],
)
async def online_disagg_training(spec: RunSpec) -> RunReport | State[Any]:
    """Train a draft model from a live target. One flow run is one training run.

    A run whose draft the gate has decided about ends as *Promoted* or *Rejected*, one of recurring training without
    anything new as *Skipped*: all three are completed.
    """
    abort_if_over()
    spec, nothing_new = what_is_new(spec)
    if nothing_new is not None:
        return Completed(name="Skipped", message=nothing_new)
    plan = preflight(spec)
    record = RunRecord(plan, flow_run_id=str(runtime.id))
    emit(plan, "started", prompts=plan.total_prompts)
    with trackers(plan) as tracking:
        try:
            async with run_slot(plan):
                completion = record.completion or await train(plan, record)
                record.archive = archive_run(plan, completion)
                emit(plan, "archived", url=record.archive.url)
                judge_training(plan, completion)
                incumbent = find_incumbent(plan)
                record.evaluations = await evaluate_drafts(plan, completion, incumbent)
            track_evaluations(plan, tracking, record.evaluations)
            judge_run(plan, record.evaluations)
            candidate = await pass_gate(plan, record, incumbent) if plan.spec.published else None
        except Exception as error:
            if record.completion is None:
                record.archive = archive_failed_run(plan)
            track_end(plan, tracking, publish_report(plan, record.failed(error)))
            emit(plan, "failed", reason=str(error))
            archive_report(plan, record.archive)
            raise
        report = publish_report(plan, record.completed())
        track_end(plan, tracking, report, candidate)
    archive_report(plan, record.archive)
    prune_archives(plan)
    emit(plan, "completed", **record.accept_lengths())
    return report if candidate is None else end_of(candidate)
