"""The trackers of a run, around the flow: what they could not be told is a warning, and no more."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from prefect.logging import get_run_logger

from disagg_core.recurring.candidate import Candidate
from disagg_core.report.document import EvaluationFigures, RunReport
from disagg_core.run.plan import RunPlan
from disagg_core.settings import get_settings
from disagg_core.tracking.observer import Decided, Evaluated, Finished
from disagg_core.tracking.run_tracking import RunTracking


@contextlib.contextmanager
def trackers(plan: RunPlan) -> Iterator[RunTracking]:
    """Run the trackers that the document asks for while the body runs.

    A run that is stopped from outside does not wait for them; they take what is left by themselves.
    """
    tracking = RunTracking(plan)
    tracking.start()
    try:
        yield tracking
    except Exception:
        _end(tracking)
        raise
    except BaseException:
        tracking.end(wait=False)
        raise
    _end(tracking)


def track_evaluations(plan: RunPlan, tracking: RunTracking, evaluations: Mapping[str, EvaluationFigures]) -> None:
    """Tell the trackers what was measured of each draft."""
    for name, figures in evaluations.items():
        tracking.tell(Evaluated(draft=plan.draft(name).folder, figures=figures))


def track_end(plan: RunPlan, tracking: RunTracking, report: RunReport, candidate: Candidate | None = None) -> None:
    """Tell the trackers what was decided and how the run ended, and wait a bounded time until they have it."""
    if candidate is not None:
        from disagg_core.registry.references import open_registry

        source = open_registry(plan.spec, get_settings()).url_of(candidate.number)
        tracking.tell(Decided(gate=candidate.gate, source=source))
    tracking.tell(Finished(report=report))
    _end(tracking)


def _end(tracking: RunTracking) -> None:
    for problem in tracking.end():
        get_run_logger().warning("tracker %s", problem)
