"""What people see of a run: the report, its plot, the artifacts in the Prefect UI, and events for automations."""

from __future__ import annotations

import base64
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from prefect import task
from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.events import emit_event

from disagg_core.archive import Archive
from disagg_core.attempts import AttemptLoop, AttemptOutcome
from disagg_core.errors import DraftlineError
from disagg_core.observability.plots import plot_run
from disagg_core.outcomes import classify
from disagg_core.plan import RunPlan
from disagg_core.report import (
    ArchiveFigures,
    AttemptFigures,
    EvaluationFigures,
    Failure,
    RoleFigures,
    RunReport,
)
from disagg_core.run_dir import write_atomically
from tasks.completion import Completion
from tasks.role_process import artifact_key
from tasks.roles import Role, RoleRun

Event = Literal["started", "attempt-failed", "archived", "completed", "failed"]


def emit(plan: RunPlan, event: Event, **payload: str | int | float | None) -> None:
    """Emit ``draftline.run.<event>`` for automations."""
    emit_event(
        event=f"draftline.run.{event}",
        resource={"prefect.resource.id": f"draftline.run.{plan.run_id}", "prefect.resource.name": plan.run_id},
        payload=dict(payload),
    )


@task(name="publish-report", task_run_name="report", cache_policy=NO_CACHE)
def publish_report(plan: RunPlan, report: RunReport) -> RunReport:
    """Write report.json, report.md and report.png, and show the same in the UI."""
    picture = plan.dir.root / "report.png"
    evaluation = report.evaluation
    plot_run(
        plan.dir.metrics / "train.jsonl",
        picture,
        title=f"{plan.run_id}: EAGLE-3 draft for {Path(plan.spec.target.model).name}",
        accept_lengths=(evaluation.accept_length_before, evaluation.accept_length_after) if evaluation else (),
    )
    write_atomically(plan.dir.root / "report.md", report.to_markdown())
    write_atomically(plan.dir.report, report.model_dump_json(indent=2))
    key = artifact_key(plan.run_id)
    create_markdown_artifact(report.to_markdown(), key=f"report-{key}", description=f"Report of run {plan.run_id}")
    if report.accounting:
        create_table_artifact(
            [report.accounting.model_dump()], key=f"accounting-{key}", description="Every sample accounted for"
        )
    data = base64.b64encode(picture.read_bytes()).decode()
    create_image_artifact(f"data:image/png;base64,{data}", key=f"plot-{key}", description="Loss and accept length")
    if report.archive:
        create_link_artifact(
            report.archive.manifest, link_text="archive manifest", key=f"archive-{key}", description=report.archive.url
        )
    return report


@dataclass
class RunRecord:
    """What the parent flow knows of its run so far; becomes the report, however the run ends."""

    plan: RunPlan
    flow_run_id: str
    began: float = field(default_factory=time.time)
    attempts: AttemptLoop = field(init=False)
    roles: dict[Role, RoleRun] = field(default_factory=dict)
    completion: Completion | None = None
    evaluation: EvaluationFigures | None = None
    archive: Archive | None = None

    def __post_init__(self) -> None:
        self.attempts = AttemptLoop(limit=self.plan.spec.run.attempts, first=self.plan.next_attempt())

    def completed(self) -> RunReport:
        """Return the report of a run that did all its work."""
        return self._report("completed", None)

    def failed(self, error: Exception) -> RunReport:
        """Return the report of a run that ended with `error`, with all that was found out before it."""
        message = str(error) if isinstance(error, DraftlineError) else f"{type(error).__name__}: {error}"
        return self._report("failed", Failure(failure_class=classify(error), message=message))

    def _report(self, state: Literal["completed", "failed"], failure: Failure | None) -> RunReport:
        done, archive = self.completion, self.archive
        return RunReport(
            run_id=self.plan.run_id,
            name=self.plan.spec.run.name,
            state=state,
            failure=failure,
            accounting=done.accounting if done else None,
            training=done.training if done else None,
            evaluation=self.evaluation,
            roles={role: _role_figures(run) for role, run in self.roles.items()},
            archive=ArchiveFigures(url=archive.url, manifest=archive.manifest) if archive else None,
            attempts=[_attempt_figures(outcome) for outcome in self.attempts.outcomes],
            store_counters=done.store_counters if done else {},
            rejected_reasons=done.rejected_reasons if done else {},
            servers=done.servers if done else [],
            run_dir=str(self.plan.root),
            export=str(self.plan.dir.export) if archive else None,
            flow_run_id=self.flow_run_id,
            seconds=time.time() - self.began,
        )


def _role_figures(run: RoleRun) -> RoleFigures:
    return RoleFigures(
        flow_run_id=str(run.flow_run_id),
        work_pool=run.work_pool,
        started=run.started,
        ended=run.ended,
        restarts=run.restarts,
    )


def _attempt_figures(outcome: AttemptOutcome) -> AttemptFigures:
    return AttemptFigures(
        attempt=outcome.attempt,
        failure_class=outcome.failure_class,
        reason=outcome.reason,
        incomplete=outcome.incomplete,
    )
