"""The evaluation: real speculative decoding with target and draft, where the target's GPU is. Pool ``gpu-rollout``."""

from __future__ import annotations

import os
import sys

from prefect import flow

from disagg_core.run.devices import visible_devices
from disagg_core.run.plan import RunPlan
from tasks.role_process import run_evaluation_process


@flow(name="draft-evaluation")
def draft_evaluation(plan: RunPlan) -> None:
    """Decode the run's held-out prompts with the drafts named in evaluation/request.json."""
    folder = plan.dir.evaluation
    run_evaluation_process(
        [sys.executable, "-m", "disagg_core.roles.evaluation", str(folder / "request.json")],
        folder / "evaluation.log",
        visible_devices(plan.spec, "rollout", os.environ),
    )
