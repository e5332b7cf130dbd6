"""Judging the draft by real speculative decoding, before and after training."""

from __future__ import annotations

import asyncio
import sys

import msgspec
from prefect import task
from prefect.cache_policies import NO_CACHE

from disagg_core.errors import EvaluationFailed, RoleFailed
from disagg_core.plan import RunPlan
from disagg_core.processes import describe_exit, spawn, stop_tree, tail
from disagg_core.report import EvaluationFigures
from disagg_core.run_dir import write_atomically
from tasks.completion import Completion


@task(name="evaluate-draft", cache_policy=NO_CACHE)
async def evaluate_draft(plan: RunPlan, completion: Completion) -> EvaluationFigures | None:
    """Decode the held-out prompts with the first and the last checkpoint; None when switched off."""
    section = plan.spec.evaluation
    if section.prompts == 0:
        return None
    request = plan.dir.evaluation / "request.json"
    checkpoints = [("before", str(completion.first_checkpoint)), ("after", str(completion.checkpoint))]
    write_atomically(request, msgspec.json.encode({"plan": plan.model_dump(mode="json"), "checkpoints": checkpoints}))
    await _run([sys.executable, "-m", "disagg_core.evaluation.role", str(request)], plan)
    before, after = (
        msgspec.json.decode((plan.dir.evaluation / f"{name}.json").read_bytes()) for name, _ in checkpoints
    )
    return EvaluationFigures(
        draft_tokens=section.draft_tokens,
        prompts=after["prompts"],
        accept_length_before=before["accept_length"],
        accept_length_after=after["accept_length"],
        interval_after=after["interval"],
        per_position_after=after["per_position"],
        lossless=before["lossless"] and after["lossless"],
    )


def judge_draft(plan: RunPlan, figures: EvaluationFigures | None) -> None:
    """Raise `EvaluationFailed` if the draft must not be used: it changes the output, or is below the minimum."""
    minimum = plan.spec.evaluation.min_accept_length
    if figures is None:
        return
    if not figures.lossless:
        raise EvaluationFailed(
            "speculative decoding gave other tokens than plain greedy decoding; the evaluation/ folder has both"
        )
    if minimum is not None and figures.accept_length_after < minimum:
        raise EvaluationFailed(
            f"accept length {figures.accept_length_after:.3f} is below evaluation.min_accept_length {minimum}; "
            "the checkpoint is kept"
        )


async def _run(command: list[str], plan: RunPlan) -> None:
    log = plan.dir.evaluation / "evaluation.log"
    process = spawn(command, log)
    try:
        while process.poll() is None:
            await asyncio.sleep(0.1)
    finally:
        code = stop_tree(process, grace_s=5)
    if code != 0:
        raise RoleFailed(f"the evaluation failed ({describe_exit(code)}); the end of {log}:\n{tail(log)}")
