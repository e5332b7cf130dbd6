"""The last step of a run whose draft may take the champion's place: version, gate, approval, promotion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from prefect import State, task
from prefect.cache_policies import NO_CACHE
from prefect.flow_runs import asuspend_flow_run
from prefect.input import RunInput
from prefect.logging import get_run_logger
from prefect.states import Completed
from pydantic import Field

from disagg_core.files import write_atomically
from disagg_core.recurring.candidate import Candidate, Incumbent, decided, read_candidate
from disagg_core.report.document import EvaluationFigures
from disagg_core.run.plan import RunPlan
from disagg_core.settings import get_settings
from tasks.completion import Completion
from tasks.evaluation import judge_drafts
from tasks.reporting import RunRecord, emit, publish_report

_APPROVAL_DAYS = 14
"""A draft that nobody has decided about for so long fails its run; the version stays, and can be promoted by hand."""


class Approval(RunInput):
    """What a person says about a draft that the gate does not decide about alone."""

    decision: Literal["approve", "reject"] = Field(
        description="approve: the draft becomes the champion; reject: the champion stays, and the run is a success."
    )
    comment: str = Field("", description="Why; kept in the run's report, and on approval in the registry.")


@task(name="incumbent", task_run_name="champion to compare with", cache_policy=NO_CACHE)
def find_incumbent(plan: RunPlan) -> Incumbent | None:
    """Return the champion that the run's draft is compared with.

    None where there is none, where nothing is published, and where the gate has compared the two already.
    """
    if not plan.spec.published or plan.dir.gate.is_file():
        return None
    from disagg_core.recurring.promotion import incumbent_of

    return incumbent_of(plan, get_settings())


def judge_run(plan: RunPlan, figures: Mapping[str, EvaluationFigures]) -> None:
    """Fail a run whose draft must not be used, unless the gate is there to reject it.

    Raises:
        EvaluationFailed: the draft must not be used.
    """
    if not plan.spec.published:
        judge_drafts(plan, figures)


@task(name="gate", task_run_name="gate", cache_policy=NO_CACHE)
def gate(plan: RunPlan, completion: Completion, incumbent: Incumbent | None, archive: str) -> Candidate:
    """Publish the run's draft as a version, and decide whether it is promoted; the decision is written down."""
    from disagg_core.recurring.promotion import judge, publish, to_be_replaced

    checkpoint, settings = completion.checkpoint_of(plan.drafts[0]), get_settings()
    published = publish(plan, settings, checkpoint=checkpoint, archive=archive)
    candidate = judge(plan, published, incumbent, replaces=to_be_replaced(plan, settings, incumbent))
    write_atomically(plan.dir.gate, candidate.model_dump_json(indent=2))
    get_run_logger().info("%s: %s, %s", published.label, candidate.gate.decision, "; ".join(candidate.gate.reasons))
    return candidate


@task(name="promote", task_run_name="promotion", cache_policy=NO_CACHE)
def move_champion(plan: RunPlan, candidate: Candidate) -> Candidate:
    """Make the candidate the champion; return it rejected if somebody has moved the champion meanwhile."""
    from disagg_core.recurring.promotion import promote

    return promote(plan, get_settings(), candidate)


async def pass_gate(plan: RunPlan, record: RunRecord, incumbent: Incumbent | None) -> Candidate:
    """Decide about the run's draft, ask a person where the gate says so, and promote it if it is to be.

    A run that asks is suspended: its process ends, and it goes on here when it is answered, in the UI or with
    ``draftline drafts approve``.
    """
    completion, archive = record.completion, record.archive
    assert completion is not None
    candidate = read_candidate(plan)
    if candidate is None:
        candidate = gate(plan, completion, incumbent, archive.url if archive is not None else "")
    record.gate = candidate.gate
    if candidate.gate.decision == "needs_approval":
        candidate = await _approved(plan, record, candidate)
    if candidate.gate.decision == "promoted":
        candidate = move_champion(plan, candidate)
    record.gate = candidate.gate
    emit(
        plan,
        candidate.gate.decision.replace("_", "-"),  # type: ignore[arg-type]
        version=candidate.label,
        reason="; ".join(candidate.gate.reasons),
    )
    return candidate


def end_of(candidate: Candidate) -> State[None]:
    """Return how a run ends about whose draft was decided: completed, under the decision's name."""
    return Completed(name=candidate.gate.decision.capitalize(), message="; ".join(candidate.gate.reasons))


async def _approved(plan: RunPlan, record: RunRecord, candidate: Candidate) -> Candidate:
    """Return the candidate as a person decides; the run is suspended until then, and comes here again when it is."""
    publish_report(plan, record.completed())
    if not record.asked:
        emit(plan, "needs-approval", version=candidate.label, reason="; ".join(candidate.gate.reasons))
        record.ask()
    form = Approval.with_initial_data(description=_question(plan, candidate))
    answer = await asuspend_flow_run(wait_for_input=form, timeout=_APPROVAL_DAYS * 24 * 3600, key="approval")
    decision = "promoted" if answer.decision == "approve" else "rejected"
    said = f"{answer.decision}d by a person" if answer.decision == "approve" else "rejected by a person"
    return decided(candidate, decision, f"{said}: {answer.comment}" if answer.comment else said)


def _question(plan: RunPlan, candidate: Candidate) -> str:
    """Return what a person who decides is told, in Markdown."""
    everything = candidate.gate.suites[0]
    low, high = everything.candidate_interval
    measured = f"accept length {everything.candidate:.3f} ({low:.3f} to {high:.3f}) on {everything.prompts} prompts"
    if everything.incumbent is not None:
        measured += f"; the champion {candidate.gate.incumbent} has {everything.incumbent:.3f}"
    facts = "\n".join(f"- {fact}" for fact in (measured, *candidate.gate.reasons))
    return (
        f"**{candidate.label}** of run {plan.run_id} needs your approval:\n\n{facts}\n\n"
        f"The report is among the run's artifacts. Without an answer the run fails after {_APPROVAL_DAYS} days; "
        f"{candidate.label} stays in the registry."
    )
