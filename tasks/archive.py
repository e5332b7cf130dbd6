"""Exporting the trained draft and archiving what the run leaves: checkpoint, metrics, spec, logs; manifest last.

The archive is made as soon as the training is complete, so that nothing that fails after it can cost the draft.
"""

from __future__ import annotations

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from disagg_core.report.archive import Archive, add_files, archive_base, archive_files
from disagg_core.run.plan import RunPlan
from disagg_core.settings import get_settings
from tasks.completion import Completion


@task(name="archive-run", task_run_name="archive", cache_policy=NO_CACHE)
def archive_run(plan: RunPlan, completion: Completion) -> Archive:
    """Export the drafts in serving format and copy the run's results to the archive."""
    from disagg_core.drafts.export import export_draft
    from disagg_core.training.checkpoint import newest_checkpoints

    for draft in plan.drafts:
        export_draft(draft.checkpoint_in(completion.checkpoint), draft.dir.export)
    kept = newest_checkpoints(plan.dir.checkpoints, plan.spec.archive.keep)
    sources: dict[str, Path] = {
        "run.json": plan.dir.document,
        "vocab_map.safetensors": plan.dir.vocab_map,
        "export": plan.dir.export,
        "drafts": plan.dir.drafts,
        "metrics": plan.dir.metrics,
        "attempts": plan.dir.root / "attempts",
        **{f"checkpoints/{path.name}": path for path in kept},
    }
    archive = archive_files(sources, archive_url(plan))
    get_run_logger().info("archived %d files, %d bytes, to %s", archive.files, archive.bytes, archive.url)
    return archive


@task(name="archive-report", task_run_name="archive, report", cache_policy=NO_CACHE)
def archive_report(plan: RunPlan, archive: Archive | None) -> Archive | None:
    """Add to the archive, if the run came to have one, what was found out after it: the evaluation and the report."""
    if archive is None:
        return None
    reports = {name: plan.root / name for name in ("report.json", "report.md", "report.png")}
    return add_files({"evaluation": plan.dir.evaluation, **reports}, archive.url)


def archive_url(plan: RunPlan) -> str:
    """Return where this run's archive goes."""
    return f"{archive_base(plan.spec.archive, get_settings())}/{plan.run_id}"
