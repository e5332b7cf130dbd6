"""Judging the drafts by real speculative decoding, before and after training."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from prefect import task
from prefect.cache_policies import NO_CACHE

from disagg_core.errors import EvaluationFailed, RoleFailed
from disagg_core.files import write_atomically
from disagg_core.recurring.candidate import INCUMBENT, Incumbent
from disagg_core.report.document import EvaluationFigures
from disagg_core.report.suites import suite_figures
from disagg_core.run.plan import PlannedDraft, RunPlan
from tasks.children import Supervision, run_child, state_name
from tasks.completion import Completion


@task(name="evaluate-draft", task_run_name="evaluation", cache_policy=NO_CACHE)
async def evaluate_drafts(
    plan: RunPlan, completion: Completion, incumbent: Incumbent | None = None
) -> dict[str, EvaluationFigures]:
    """Decode the held-out prompts with each draft as it began and as it came of training, and with the `incumbent`.

    Returns what was measured, by the draft's name: nothing when switched off. What the gate has decided by is not
    measured again.
    """
    if not plan.spec.evaluation.measured:
        return {}
    if plan.dir.gate.is_file():
        return {draft.name: _figures(plan, draft) for draft in plan.drafts}
    checkpoints = []
    for draft in plan.drafts:
        checkpoints.append((draft.result_name("before"), str(draft.checkpoint_in(completion.first_checkpoint))))
        checkpoints.append((draft.result_name("after"), str(completion.checkpoint_of(draft))))
    champion = [INCUMBENT] if incumbent is not None else []
    if incumbent is not None:
        checkpoints.append((INCUMBENT, str(incumbent.path)))
    write_atomically(
        plan.dir.evaluation / "request.json",
        msgspec.json.encode(
            {
                "plan": plan.model_dump(mode="json"),
                "checkpoints": checkpoints,
                "suites_of": [draft.result_name("after") for draft in plan.drafts] + champion,
                "references": champion,
                "threads": plan.spec.target.cpu_threads,
            }
        ),
    )
    orchestration = plan.spec.orchestration
    run = await run_child(
        "draft-evaluation",
        orchestration.pools.rollout,
        {"plan": plan.model_dump(mode="json")},
        name=f"{plan.run_id} evaluation",
        tags=["draftline", "role:evaluation", f"run:{plan.run_id}", "gpu", *orchestration.tags],
        start_timeout_s=None,  # another run's producer may hold the pool for hours, and nothing is lost by waiting
        supervision=Supervision(),
    )
    if state_name(run) != "Completed":
        raise RoleFailed(f"the evaluation ended as {state_name(run)}: {run.state.message if run.state else ''}")
    return {draft.name: _figures(plan, draft) for draft in plan.drafts}


def _figures(plan: RunPlan, draft: PlannedDraft) -> EvaluationFigures:
    before, after = (
        msgspec.json.decode((plan.dir.evaluation / f"{draft.result_name(when)}.json").read_bytes())
        for when in ("before", "after")
    )
    return EvaluationFigures(
        draft_tokens=plan.spec.evaluation.draft_tokens,
        prompts=after["prompts"],
        accept_length_before=before["accept_length"],
        accept_length_after=after["accept_length"],
        interval_after=after["interval"],
        per_position_after=after["per_position"],
        lossless=before["lossless"] and after["lossless"],
        tokens_per_second=after["tokens"] / after["seconds"],
        suites=suite_figures(after.get("suites", {}), incumbent=INCUMBENT),
    )


def judge_drafts(plan: RunPlan, figures: Mapping[str, EvaluationFigures]) -> None:
    """Raise `EvaluationFailed` if one of the drafts, by name, must not be used; of several the first is named."""
    for name, found in figures.items():
        try:
            judge_draft(plan, found)
        except EvaluationFailed as error:
            if len(figures) == 1:
                raise
            raise EvaluationFailed(f"draft {name}: {error}") from error


def judge_draft(plan: RunPlan, figures: EvaluationFigures) -> None:
    """Raise `EvaluationFailed` if the draft must not be used: it changes the output, or is below the minimum."""
    minimum = plan.spec.evaluation.min_accept_length
    if not figures.lossless:
        raise EvaluationFailed(
            "speculative decoding gave other tokens than plain greedy decoding; the evaluation/ folder has both"
        )
    if minimum is not None and figures.accept_length_after < minimum:
        raise EvaluationFailed(
            f"accept length {figures.accept_length_after:.3f} is below evaluation.min_accept_length {minimum}; "
            "the checkpoint is kept"
        )
