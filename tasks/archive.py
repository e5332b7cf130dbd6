"""Exporting the trained draft and archiving what the run leaves, also a failed one's; manifest last.

The archive is made as soon as the training is complete, so that nothing that fails after it can cost the draft.
"""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from disagg_core.errors import DraftlineError
from disagg_core.registry.retained import prune
from disagg_core.report.archive import Archive, archive_base
from disagg_core.run.plan import RunPlan
from disagg_core.settings import get_settings
from tasks.completion import Completion


@task(name="archive-run", task_run_name="archive", cache_policy=NO_CACHE)
def archive_run(plan: RunPlan, completion: Completion) -> Archive:
    """Export the drafts in serving format and copy the run's results to the archive."""
    from disagg_core.drafts.export import export_draft

    for draft in plan.drafts:
        export_draft(completion.checkpoint_of(draft), draft.dir.export)
    return _archived(plan, complete=True)


@task(name="archive-failed-run", task_run_name="archive, failed run", cache_policy=NO_CACHE)
def archive_failed_run(plan: RunPlan) -> Archive | None:
    """Copy to the archive what a run left that did not complete its training: enough to judge it.

    None if that fails too, which is logged: what is to be told is why the run failed.
    """
    try:
        return _archived(plan, complete=False)
    except (DraftlineError, OSError) as error:
        get_run_logger().warning("the failed run could not be archived: %s; its directory is %s", error, plan.root)
        return None


@task(name="archive-report", task_run_name="archive, report", cache_policy=NO_CACHE)
def archive_report(plan: RunPlan, archive: Archive | None) -> Archive | None:
    """Add to the archive, if the run came to have one, what was found out after it, and TensorBoard's whole files."""
    from disagg_core.registry.run_archive import add_report

    return None if archive is None else add_report(plan, archive)


@task(name="prune-archives", task_run_name="archive, retention", cache_policy=NO_CACHE)
def prune_archives(plan: RunPlan) -> list[str]:
    """Remove the archives that `archive.retention` lets go, and return the ids of their runs; none without it.

    What keeps it from that is logged: the run has done its work.
    """
    retention = plan.spec.archive.retention
    if retention is None:
        return []
    base = archive_base(plan.spec.archive, get_settings())
    try:
        gone = [archive.facts.run_id for archive in prune(base, last=retention.last, days=retention.days)]
    except (DraftlineError, OSError) as error:
        get_run_logger().warning("old archives in %s were not removed: %s", base, error)
        return []
    if gone:
        get_run_logger().info("removed the archives of %s, as archive.retention says", ", ".join(gone))
    return gone


def _archived(plan: RunPlan, *, complete: bool) -> Archive:
    from disagg_core.registry.run_archive import archive_directory

    archive = archive_directory(plan, get_settings(), complete=complete)
    get_run_logger().info("archived %d files, %d bytes, to %s", archive.files, archive.bytes, archive.url)
    return archive
