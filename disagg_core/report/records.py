"""The report of a run as files: written, read again, and put together for a run that was cut off.

A run that ends by itself reports what it knows. One that was cancelled, or whose process was killed, is reported by
whoever finds it, from what lies in its directory: how far its roles last said they were, how its attempts ended.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import yaml

from disagg_core.errors import FailureClass
from disagg_core.files import write_atomically
from disagg_core.report.document import AttemptFigures, EndState, Failure, ProgressFigures, RunReport
from disagg_core.report.markdown import to_markdown
from disagg_core.report.page import to_html
from disagg_core.report.plots import plot_comparison, plot_run
from disagg_core.report.time_spent import time_spent
from disagg_core.run.directory import RunDir
from disagg_core.run.known import read_document, read_plan
from disagg_core.run.outcomes import read_outcome
from disagg_core.run.plan import RunPlan
from disagg_core.run.progress import ProgressValue, read_progress

REPORT_FILES = ("report.json", "report.md", "report.html", "report.png")
"""The files of a report, in the run's directory."""
log = logging.getLogger(__name__)


def write_report(plan: RunPlan, report: RunReport) -> Path | None:
    """Write report.png, report.md, report.html and, last, report.json into the run's directory.

    Returns the picture; None if it could not be drawn, which is logged and costs nothing else.
    """
    picture = _picture(plan, report)
    shown = to_markdown(report)
    if picture is not None:
        shown += f"\n![Loss and accept length]({picture.name})\n"
    write_atomically(plan.dir.root / "report.md", shown)
    page = to_html(
        report,
        subtitle=_title(plan),
        document=yaml.safe_dump(plan.spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        picture=picture.read_bytes() if picture is not None else None,
    )
    write_atomically(plan.dir.root / "report.html", page)
    write_atomically(plan.dir.report, report.model_dump_json(indent=2))
    return picture


def _picture(plan: RunPlan, report: RunReport) -> Path | None:
    picture = plan.dir.root / "report.png"
    try:
        _draw(plan, report, picture)
    except Exception:  # whatever the drawing library makes of the figures, the report has to be written
        log.warning("the report of %s has no picture", plan.run_id, exc_info=True)
        picture.unlink(missing_ok=True)
        return None
    return picture


def _draw(plan: RunPlan, report: RunReport, picture: Path) -> None:
    title = f"{plan.run_id}: {_title(plan)}"
    if len(plan.drafts) > 1:
        metrics = {draft.name: draft.dir.train_metrics for draft in plan.drafts}
        plot_comparison(metrics, report.evaluations, picture, title=title)
        return
    found = report.evaluation
    lengths = (found.accept_length_before, found.accept_length_after) if found else ()
    plot_run(plan.dir.train_metrics, picture, title=title, accept_lengths=lengths)


def _title(plan: RunPlan) -> str:
    target = "/".join(Path(plan.spec.target.model).parts[-2:])
    return f"{plan.spec.drafts_title} for {target}"


def read_report(path: Path) -> RunReport:
    """Return the report in `path`.

    Raises:
        OtherVersion: its fields are not those of this version.
    """
    return read_document(path, RunReport)


def report_interrupted(run_dir: RunDir, state: EndState, reason: str, flow_run_id: str) -> RunReport | None:
    """Write and return the report of a run that can no longer do so itself.

    None where there is nothing to do: the run had not begun, or has its report.

    Raises:
        OtherVersion: the run was planned by another version.
    """
    if run_dir.report.is_file() or not run_dir.document.is_file():
        return None
    plan = read_plan(run_dir)
    report = RunReport(
        run_id=plan.run_id,
        name=plan.spec.run.name,
        state=state,
        failure=Failure(failure_class="bug" if state == "failed" else "preempted", message=reason),
        progress=last_progress(plan),
        accounting=None,
        training=None,
        evaluation=None,
        time_spent=time_spent(plan),
        roles={},
        archive=None,
        attempts=_attempts(plan, reason),
        store_counters={},
        rejected_reasons={},
        run_dir=str(plan.root),
        export=None,
        flow_run_id=flow_run_id,
        seconds=time.time() - run_dir.document.stat().st_mtime,
    )
    write_report(plan, report)
    return report


def last_progress(plan: RunPlan) -> ProgressFigures | None:
    """Return how far the roles of a run last said they were; None before its first attempt."""
    numbers = plan.dir.begun_attempts()
    if not numbers:
        return None
    producer = _newest_progress(plan, "producer.json", "prompts")
    consumer = _newest_progress(plan, "consumer.json", "trained")
    trained, loss = _count(consumer, "trained"), consumer.get("loss")
    losses = {draft.name: consumer.get(draft.figure("loss")) for draft in plan.drafts if draft.folder}
    return ProgressFigures(
        attempt=numbers[-1],
        prompts=max(_count(producer, "prompts"), trained),  # the producer's word may be the older one
        total_prompts=plan.total_prompts,
        steps=_count(consumer, "step"),
        total_steps=plan.total_steps,
        trained=trained,
        loss=loss if isinstance(loss, float) else None,
        losses={name: last for name, last in losses.items() if isinstance(last, float)},
    )


def _count(progress: dict[str, ProgressValue], name: str) -> int:
    value = progress.get(name, 0)
    return value if isinstance(value, int) else 0


def _newest_progress(plan: RunPlan, file: str, field: str) -> dict[str, ProgressValue]:
    """Return the progress of the newest attempt that had come to say `field`; empty if none had."""
    found = (read_progress(_state(plan, number) / file) for number in reversed(plan.dir.begun_attempts()))
    return next((progress for progress in found if field in progress), {})


def _attempts(plan: RunPlan, reason: str) -> list[AttemptFigures]:
    """Return the ends of the begun attempts by what their roles left; `reason` is what ended the last one."""
    ends = []
    numbers = plan.dir.begun_attempts()
    for number in numbers:
        unsaid: tuple[FailureClass, str] = (
            "preempted",
            reason if number == numbers[-1] else "its roles left no word",
        )
        failure_class, why = _failure_of(plan, number) or unsaid
        ends.append(AttemptFigures(attempt=number, failure_class=failure_class, reason=why, incomplete=0))
    return ends


def _failure_of(plan: RunPlan, attempt: int) -> tuple[FailureClass, str] | None:
    """Return the first failure of an attempt's roles that is not the answer to a stop signal."""
    found: list[tuple[float, FailureClass, str]] = []
    for role in ("producer", "consumer"):
        outcome = read_outcome(_state(plan, attempt) / f"{role}-outcome.json")
        if outcome is not None and outcome.failure_class not in (None, "preempted"):
            found.append((outcome.ended, outcome.failure_class, f"{role}: {outcome.message}"))
    return min(found)[1:] if found else None


def _state(plan: RunPlan, attempt: int) -> Path:
    return plan.dir.attempt(attempt).state
