"""Weights & Biases: the run under its own id, so that a later process of the run goes on with it.

The key is that of the environment (WANDB_API_KEY) or of a login on the machine of the parent flow. What is written
offline lies in ``tracking/wandb/`` of the run's directory, for ``wandb sync``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from disagg_core.report.document import EvaluationFigures, GateFigures, RunReport
from disagg_core.run_spec.results import WandbSection
from disagg_core.tracking.observer import Step, TrackedRun, evaluation_scalars, named, scalars_of


class WandbObserver:
    """Logs each draft's figures over its own steps; what was measured and decided goes into the run's summary."""

    def __init__(self, section: WandbSection) -> None:
        self._section = section
        self._run: Any = None

    def started(self, run: TrackedRun) -> None:
        """Begin the run, or go on with it."""
        import wandb

        place = run.root / "tracking"
        place.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=self._section.project,
            entity=self._section.entity,
            mode=self._section.mode,
            id=run.run_id,
            name=run.run_id,
            group=run.name,
            resume="allow",
            dir=str(place),
            config={"document": run.document, "identity": run.identity},
            settings=wandb.Settings(console="off", silent=True, disable_code=True, disable_git=True),
        )
        for draft in run.drafts:
            self._run.define_metric(named(draft, "step"))
            self._run.define_metric(named(draft, "*"), step_metric=named(draft, "step"))

    def steps(self, draft: str, steps: Sequence[Step]) -> None:
        """Log the scalars of each step."""
        for step in steps:
            scalars = {named(draft, name): value for name, value in scalars_of(step)}
            self._run.log({named(draft, "step"): int(step["step"]), **scalars})

    def evaluated(self, draft: str, figures: EvaluationFigures) -> None:
        """Put what was measured into the summary."""
        measured = evaluation_scalars(figures)
        self._run.summary.update({named(draft, f"evaluation/{name}"): value for name, value in measured})

    def decided(self, gate: GateFigures, source: str) -> None:
        """Put the decision into the summary."""
        reasons = "; ".join(gate.reasons)
        self._run.summary.update({"decision": gate.decision, "version": gate.candidate, "reasons": reasons})

    def finished(self, report: RunReport) -> None:
        """Put the end into the summary."""
        failure = report.failure.message if report.failure else ""
        self._run.summary.update({"state": report.state, "failure": failure})

    def close(self) -> None:
        """Send, or write, what is left."""
        failed = self._run.summary.get("state", "completed") != "completed"
        self._run.finish(exit_code=int(failed))
