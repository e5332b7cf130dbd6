"""Exporting the trained draft and archiving what the run leaves, also a failed one's; manifest last.

The archive is made as soon as the training is complete, so that nothing that fails after it can cost the draft.
"""

from __future__ import annotations

import time
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from disagg_core.errors import DraftlineError
from disagg_core.registry.retained import prune
from disagg_core.report.archive import Archive, ArchiveFacts, add_files, archive_base, archive_files
from disagg_core.report.records import REPORT_FILES
from disagg_core.run.environment import write_environment
from disagg_core.run.plan import RunPlan
from disagg_core.settings import get_settings
from tasks.completion import Completion


@task(name="archive-run", task_run_name="archive", cache_policy=NO_CACHE)
def archive_run(plan: RunPlan, completion: Completion) -> Archive:
    """Export the drafts in serving format and copy the run's results to the archive."""
    from disagg_core.drafts.export import export_draft

    for draft in plan.drafts:
        export_draft(draft.checkpoint_in(completion.checkpoint), draft.dir.export)
    return _archived(plan, _sources(plan), complete=True)


@task(name="archive-failed-run", task_run_name="archive, failed run", cache_policy=NO_CACHE)
def archive_failed_run(plan: RunPlan) -> Archive | None:
    """Copy to the archive what a run left that did not complete its training: enough to judge it.

    None if that fails too, which is logged: what is to be told is why the run failed.
    """
    try:
        return _archived(plan, _sources(plan), complete=False)
    except (DraftlineError, OSError) as error:
        get_run_logger().warning("the failed run could not be archived: %s; its directory is %s", error, plan.root)
        return None


@task(name="archive-report", task_run_name="archive, report", cache_policy=NO_CACHE)
def archive_report(plan: RunPlan, archive: Archive | None) -> Archive | None:
    """Add to the archive, if the run came to have one, what was found out after it, and TensorBoard's whole files."""
    if archive is None:
        return None
    reports = {name: plan.root / name for name in REPORT_FILES}
    found = {"evaluation": plan.dir.evaluation, "tensorboard": plan.dir.tensorboard}
    return add_files({**found, **reports}, archive.url)


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


def archive_url(plan: RunPlan) -> str:
    """Return where this run's archive goes."""
    return f"{archive_base(plan.spec.archive, get_settings())}/{plan.run_id}"


def _sources(plan: RunPlan) -> dict[str, Path]:
    from disagg_core.training.checkpoint import kept_checkpoints

    kept = kept_checkpoints(plan.dir.checkpoints, plan.spec.archive.keep)
    return {
        "run.json": plan.dir.document,
        "completion.json": plan.dir.completion,
        "vocab_map.safetensors": plan.dir.vocab_map,
        "export": plan.dir.export,
        "drafts": plan.dir.drafts,
        "metrics": plan.dir.metrics,
        "profiles": plan.dir.profiles,
        "attempts": plan.dir.root / "attempts",
        **{f"checkpoints/{path.name}": path for path in kept},
    }


def _archived(plan: RunPlan, sources: dict[str, Path], *, complete: bool) -> Archive:
    from disagg_core.registry.references import registry_url

    settings = get_settings()
    environment = plan.root / "environment.json"
    write_environment(environment, settings.sglang_python)
    facts = ArchiveFacts(
        run_id=plan.run_id,
        name=plan.spec.run.name,
        created=time.time(),
        complete=complete,
        registry=registry_url(plan.spec.registry, settings),
    )
    archive = archive_files({**sources, "environment.json": environment}, archive_url(plan), facts)
    get_run_logger().info("archived %d files, %d bytes, to %s", archive.files, archive.bytes, archive.url)
    return archive
