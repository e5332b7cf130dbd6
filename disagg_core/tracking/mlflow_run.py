"""MLflow: a run of an experiment on a tracking server, found again by the run's id; promotions in its model registry.

User and password, or a token, are read by MLflow's client from MLFLOW_TRACKING_USERNAME, _PASSWORD and _TOKEN.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from disagg_core.report.document import EndState, EvaluationFigures, GateFigures, RunReport
from disagg_core.run_spec.results import MlflowSection
from disagg_core.tracking.mlflow_models import RUN_ID, find_run, make_champion
from disagg_core.tracking.observer import Step, TrackedRun, evaluation_scalars, named, scalars_of

_STATUS: dict[EndState, str] = {
    "completed": "FINISHED",
    "failed": "FAILED",
    "cancelled": "KILLED",
    "crashed": "KILLED",
}
_PARAMETERS = 100
"""Parameters that a server takes in one request."""
_METRICS = 1000
"""Metrics that a server takes in one request."""
_LONGEST = 500
"""Characters of a parameter that every server takes."""
_LONGEST_TAG = 5000
"""Characters of a tag that every server takes."""


class MlflowObserver:
    """Logs through MLflow's client, which speaks the server's REST API and keeps no state of its own."""

    def __init__(self, section: MlflowSection) -> None:
        from mlflow import MlflowClient

        self._section = section
        self._client: Any = MlflowClient(section.uri)
        self._run = ""

    def started(self, run: TrackedRun) -> None:
        """Begin the run, or go on with it; its document becomes parameters, its identity tags."""
        from mlflow.entities import Param

        known = self._known(run.run_id)
        if known is not None:
            self._run = known
            self._client.update_run(known, status="RUNNING")
            return
        tags = {RUN_ID: run.run_id, **{f"draftline.{name}": value for name, value in run.identity.items()}}
        made = self._client.create_run(self._experiment(), run_name=run.run_id, tags=tags)
        self._run = made.info.run_id
        parameters = [Param(name, value[:_LONGEST]) for name, value in _flat(run.document)]
        for start in range(0, len(parameters), _PARAMETERS):
            self._client.log_batch(self._run, params=parameters[start : start + _PARAMETERS])

    def steps(self, draft: str, steps: Sequence[Step]) -> None:
        """Log the scalars of the steps, many in a request."""
        from mlflow.entities import Metric

        metrics = [
            Metric(named(draft, name), value, int(1000 * step.get("time", time.time())), int(step["step"]))
            for step in steps
            for name, value in scalars_of(step)
            if math.isfinite(value)
        ]
        for start in range(0, len(metrics), _METRICS):
            self._client.log_batch(self._run, metrics=metrics[start : start + _METRICS])

    def evaluated(self, draft: str, figures: EvaluationFigures) -> None:
        """Log what was measured as metrics of one step."""
        for name, value in evaluation_scalars(figures):
            self._client.log_metric(self._run, named(draft, f"evaluation/{name}"), value)

    def decided(self, gate: GateFigures, source: str) -> None:
        """Tag the run with the decision; a promotion becomes a version of the registered model."""
        tags = {"decision": gate.decision, "version": gate.candidate, "reasons": "; ".join(gate.reasons)}
        for name, value in tags.items():
            self._client.set_tag(self._run, f"draftline.{name}", value[:_LONGEST_TAG])
        if gate.decision == "promoted" and self._section.registered_model is not None:
            make_champion(
                self._client,
                self._section.registered_model,
                source=source,
                label=gate.candidate,
                run_id=self._tag(RUN_ID),
                run=self._run,
            )

    def finished(self, report: RunReport) -> None:
        """End the run as what it was."""
        if report.failure is not None:
            self._client.set_tag(self._run, "draftline.failure", report.failure.message[:_LONGEST_TAG])
        self._client.set_terminated(self._run, status=_STATUS[report.state])

    def close(self) -> None:
        """Everything that was told is on the server."""

    def _experiment(self) -> str:
        name = self._section.experiment
        found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id if found is not None else self._client.create_experiment(name))

    def _known(self, run_id: str) -> str | None:
        return find_run(self._client, self._experiment(), run_id)

    def _tag(self, name: str) -> str:
        return str(self._client.get_run(self._run).data.tags[name])


def _flat(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the values of a nested document by their dotted names."""
    for name, value in document.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}", str(value)
