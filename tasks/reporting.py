"""What people see of a run: the report, its plot, the artifacts in the Prefect UI, and events for automations."""

from __future__ import annotations

import base64
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx
from prefect import task
from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.events import emit_event
from prefect.logging import get_run_logger
from pydantic import BaseModel, ConfigDict

from disagg_core.errors import DraftlineError, NotGoodEnough, classify
from disagg_core.files import write_atomically
from disagg_core.report.archive import Archive
from disagg_core.report.comparison import HEAD, comparison_of
from disagg_core.report.document import (
    ArchiveFigures,
    AttemptFigures,
    DraftFigures,
    EndState,
    EvaluationFigures,
    Failure,
    GateFigures,
    RoleFigures,
    RunReport,
)
from disagg_core.report.figures import figures_of
from disagg_core.report.markdown import to_markdown
from disagg_core.report.records import last_progress, write_report
from disagg_core.report.time_spent import time_spent
from disagg_core.run.attempts import AttemptLoop, AttemptOutcome
from disagg_core.run.known import read_document
from disagg_core.run.plan import RunPlan
from tasks.completion import Completion, read_completion
from tasks.role_process import artifact_key
from tasks.roles import Role, RoleRun
from tasks.server_away import wait_for_server

Event = Literal[
    "promoted", "rejected", "needs-approval", "skipped", "started", "attempt-failed", "archived", "completed", "failed"
]


def emit(plan: RunPlan, event: Event, **payload: str | int | float | None) -> None:
    """Emit ``draftline.run.<event>`` for automations."""
    emit_for(plan.run_id, event, **payload)


def emit_for(run_id: str, event: Event, **payload: str | int | float | None) -> None:
    """Emit ``draftline.run.<event>`` of a run that has no plan, or none yet."""
    emit_event(
        event=f"draftline.run.{event}",
        resource={"prefect.resource.id": f"draftline.run.{run_id}", "prefect.resource.name": run_id},
        payload=dict(payload),
    )


@task(name="publish-report", task_run_name="report", cache_policy=NO_CACHE)
def publish_report(plan: RunPlan, report: RunReport) -> RunReport:
    """Write the files of the report, and show the same in the UI."""
    picture = write_report(plan, report)
    wait_for_server()
    try:
        _show(plan, report, picture)
    except httpx.HTTPError as error:  # the files say the same
        get_run_logger().warning("the report of run %s is not shown in the UI: %s", plan.run_id, error)
    return report


def _show(plan: RunPlan, report: RunReport, picture: Path | None) -> None:
    key = artifact_key(plan.run_id)
    decided = f": {report.gate.decision.replace('_', ' ')}" if report.gate is not None else ""
    about = f"Report of run {plan.run_id}{decided}"  # one that asks has a report before and after
    create_markdown_artifact(to_markdown(report), key=f"report-{key}", description=about)
    rows = [{"figure": figure.label, "value": figure.value} for figure in figures_of(report)]
    create_table_artifact(rows, key=f"figures-{key}", description="What the run came to")
    if compared := comparison_of(report):
        table = [dict(zip(HEAD, row, strict=True)) for row in compared]
        create_table_artifact(table, key=f"drafts-{key}", description="The drafts beside each other")
    if picture is not None:
        data = base64.b64encode(picture.read_bytes()).decode()
        create_image_artifact(f"data:image/png;base64,{data}", key=f"plot-{key}", description="Loss and accept length")
    if report.archive:
        create_link_artifact(
            report.archive.manifest, link_text="archive manifest", key=f"archive-{key}", description=report.archive.url
        )


class _Kept(BaseModel):
    """What a process of a run knows that no other file of the run says, for one that goes on when it is trained."""

    model_config = ConfigDict(frozen=True)

    attempts: list[AttemptFigures] = []
    roles: dict[Role, RoleFigures] = {}
    seconds: float = 0.0
    asked: bool = False


@dataclass
class RunRecord:
    """What the parent flow knows of its run so far; becomes the report, however the run ends.

    A process that goes on with a run whose training is complete, after an approval or another try, reports the attempts
    and roles of the one that completed it. `seconds` of a report are those that both worked.
    """

    plan: RunPlan
    flow_run_id: str
    began: float = field(default_factory=time.time)
    attempts: AttemptLoop = field(init=False)
    roles: dict[Role, RoleRun] = field(default_factory=dict)
    restarts: Counter[Role] = field(default_factory=Counter)
    completion: Completion | None = field(init=False)
    evaluations: dict[str, EvaluationFigures] = field(default_factory=dict)
    gate: GateFigures | None = None
    archive: Archive | None = None

    def __post_init__(self) -> None:
        self.attempts = AttemptLoop(limit=self.plan.spec.run.attempts, first=self.plan.next_attempt())
        self.completion = read_completion(self.plan.dir)
        trained = self.completion is not None and self.plan.dir.record.is_file()
        self._kept = read_document(self.plan.dir.record, _Kept) if trained else _Kept()
        self._before_s = self._kept.seconds

    def attempt_ended(self, outcome: AttemptOutcome, roles: dict[Role, RoleRun]) -> None:
        """Record how an attempt and its roles ended."""
        self.attempts.record(outcome)
        self.roles = roles
        self.restarts.update({role: run.restarts for role, run in roles.items()})

    def trained(self, completion: Completion) -> Completion:
        """Record, also for a later process of this run, that its training is complete; return `completion`."""
        self.completion = completion
        self._keep(attempts=self._attempts(), roles=self._roles())
        write_atomically(self.plan.dir.completion, completion.model_dump_json(indent=2))
        return completion

    @property
    def asked(self) -> bool:
        """Whether this or an earlier process of the run has told that a person is asked about the draft."""
        return self._kept.asked

    def ask(self) -> None:
        """Record, also for a later process of this run, that it was told that a person is asked."""
        self._keep(asked=True)

    def _keep(self, **known: Any) -> None:
        self._kept = self._kept.model_copy(update={**known, "seconds": self._seconds()})
        write_atomically(self.plan.dir.record, self._kept.model_dump_json(indent=2))

    def _seconds(self) -> float:
        return self._before_s + time.time() - self.began

    def accept_lengths(self) -> dict[str, float | None]:
        """Return what was measured after training, as an event says it: of several drafts each with its name."""
        lengths = {
            self.plan.draft(name).figure("accept_length"): found.accept_length_after
            for name, found in self.evaluations.items()
        }
        return {"accept_length": None, **lengths}

    def completed(self) -> RunReport:
        """Return the report of a run that did all its work."""
        return self._report("completed", None)

    def failed(self, error: Exception) -> RunReport:
        """Return the report of a run that ended with `error`, with all that was found out before it."""
        message = str(error) if isinstance(error, DraftlineError) else f"{type(error).__name__}: {error}"
        judged = isinstance(error, NotGoodEnough)
        if self.completion is not None and not self.evaluations and not judged:
            message = f"{'archive' if self.archive is None else 'evaluation'} failed: {message}"
        return self._report("failed", Failure(failure_class=classify(error), message=message, judged=judged))

    def _report(self, state: EndState, failure: Failure | None) -> RunReport:
        done, archive = self.completion, self.archive
        attempts, roles = (self._attempts(), self._roles()) if done is None else (self._kept.attempts, self._kept.roles)
        drafts = [self._draft_figures(found) for found in done.drafts] if done else []
        return RunReport(
            run_id=self.plan.run_id,
            name=self.plan.spec.run.name,
            state=state,
            failure=failure,
            progress=last_progress(self.plan) if done is None else None,
            accounting=done.accounting if done else None,
            training=done.training if done else None,
            evaluation=next(iter(self.evaluations.values()), None) if len(drafts) == 1 else None,
            drafts=drafts,
            time_spent=time_spent(self.plan),
            gate=self.gate,
            roles=roles,
            archive=ArchiveFigures(url=archive.url, manifest=archive.manifest) if archive else None,
            attempts=attempts,
            store_counters=done.store_counters if done else {},
            rejected_reasons=done.rejected_reasons if done else {},
            quarantined_reasons=done.quarantined_reasons if done else {},
            servers=done.servers if done else [],
            run_dir=str(self.plan.root),
            export=drafts[0].export if len(drafts) == 1 else None,
            flow_run_id=self.flow_run_id,
            seconds=self._seconds(),
        )

    def _attempts(self) -> list[AttemptFigures]:
        return [_attempt_figures(outcome) for outcome in self.attempts.outcomes]

    def _roles(self) -> dict[Role, RoleFigures]:
        return {role: _role_figures(run, self.restarts[role]) for role, run in self.roles.items()}

    def _draft_figures(self, found: DraftFigures) -> DraftFigures:
        export = str(self.plan.draft(found.name).dir.export) if self.archive else None
        return found.model_copy(update={"evaluation": self.evaluations.get(found.name), "export": export})


def _role_figures(run: RoleRun, restarts: int) -> RoleFigures:
    return RoleFigures(
        flow_run_id=str(run.flow_run_id),
        work_pool=run.work_pool,
        started=run.started,
        ended=run.ended,
        restarts=restarts,
    )


def _attempt_figures(outcome: AttemptOutcome) -> AttemptFigures:
    return AttemptFigures(
        attempt=outcome.attempt,
        failure_class=outcome.failure_class,
        reason=outcome.reason,
        incomplete=outcome.incomplete,
    )
