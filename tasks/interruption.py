"""The end of a run whose own process is gone: reported, told to its trackers, archived.

Whoever finds such a run does it: the worker that the run's process belonged to, or the command that has waited for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
from collections.abc import Iterator
from pathlib import Path

from disagg_core.errors import DraftlineError
from disagg_core.report.document import EndState, RunReport
from disagg_core.report.records import read_report, report_interrupted
from disagg_core.run.directory import RunDir
from disagg_core.run.known import read_plan
from disagg_core.run.plan import RunPlan
from disagg_core.settings import get_settings
from disagg_core.tracking.observer import Finished
from disagg_core.tracking.run_tracking import RunTracking

_TRACKERS_S = 10.0
"""How long trackers may take for the end of an interrupted run."""
log = logging.getLogger(__name__)


def end_interrupted(run_dir: RunDir, state: EndState, reason: str, flow_run_id: str) -> None:
    """Report and archive a run that can no longer do so itself; nothing is done to one that has, or had not begun.

    Of several who find it, one does it and the others wait. What fails of trackers and archive is logged.

    Raises:
        OtherVersion: the run was planned by another version.
    """
    if not run_dir.document.is_file():
        return
    with _alone(run_dir.root / ".ending.lock"):
        fresh = report_interrupted(run_dir, state, reason, flow_run_id)
        report = fresh or read_report(run_dir.report)
        unfinished = report.state in ("cancelled", "crashed") and report.archive is None
        if fresh is not None or unfinished:
            _end(read_plan(run_dir), report)


def _end(plan: RunPlan, report: RunReport) -> None:
    from disagg_core.registry.run_archive import archive_reported

    tracking = RunTracking(plan, last_s=_TRACKERS_S)
    tracking.start()
    tracking.tell(Finished(report=report))
    for problem in tracking.end():
        log.warning("run %s: tracker %s", plan.run_id, problem)
    try:
        archive_reported(plan, report, get_settings())
    except (DraftlineError, OSError) as error:
        log.warning(
            "run %s could not be archived: %s; `draftline archive create %s` does it", plan.run_id, error, plan.run_id
        )


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the file `path` locked, as no other process does meanwhile."""
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
