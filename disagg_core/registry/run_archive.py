"""What of a run's directory goes into its archive, and the archive of a run that cannot make it itself any more."""

from __future__ import annotations

import time
from pathlib import Path

from disagg_core.errors import BadInput
from disagg_core.registry.references import registry_url
from disagg_core.report.archive import Archive, ArchiveFacts, add_files, archive_base, archive_files
from disagg_core.report.document import ArchiveFigures, RunReport
from disagg_core.report.records import REPORT_FILES, read_report, report_interrupted, write_report
from disagg_core.run.environment import write_environment
from disagg_core.run.plan import RunPlan
from disagg_core.settings import Settings
from disagg_core.training.checkpoint import kept_checkpoints

QUIET_S = 300.0
"""A run none of whose files was written for so long is taken for ended."""


class RunAtWork(BadInput):
    """A run may still be writing its files; when it last did is named."""


def archive_url(plan: RunPlan, settings: Settings) -> str:
    """Return where a run's archive goes."""
    return f"{archive_base(plan.spec.archive, settings)}/{plan.run_id}"


def archive_directory(plan: RunPlan, settings: Settings, *, complete: bool) -> Archive:
    """Copy what a run has left so far to its archive; the report comes later, see `add_report`.

    Raises:
        StorageFailed, StorageUnusable: the storage went on failing, or refused.
    """
    environment = plan.root / "environment.json"
    write_environment(environment, settings.sglang_python)
    facts = ArchiveFacts(
        run_id=plan.run_id,
        name=plan.spec.run.name,
        created=time.time(),
        complete=complete,
        registry=registry_url(plan.spec.registry, settings),
    )
    return archive_files({**_sources(plan), "environment.json": environment}, archive_url(plan, settings), facts)


def add_report(plan: RunPlan, archive: Archive) -> Archive:
    """Add what was found out after the archive was made, and TensorBoard's files, which were written until then.

    Raises:
        StorageFailed, StorageUnusable, TreeDamaged: the storage went on failing; the archive is what it was.
    """
    reports = {name: plan.root / name for name in REPORT_FILES}
    found = {"evaluation": plan.dir.evaluation, "tensorboard": plan.dir.tensorboard, "gate.json": plan.dir.gate}
    return add_files({**found, **reports}, archive.url)


def archive_reported(plan: RunPlan, report: RunReport, settings: Settings) -> RunReport:
    """Archive a run that has ended without doing so, and return its report, which now says where.

    Raises:
        StorageFailed, StorageUnusable: the storage went on failing, or refused.
    """
    archive = archive_directory(plan, settings, complete=plan.dir.completion.is_file())
    report = report.model_copy(update={"archive": ArchiveFigures(url=archive.url, manifest=archive.manifest)})
    write_report(plan, report)
    add_report(plan, archive)
    return report


def archive_ended(plan: RunPlan, settings: Settings, *, sure: bool = False) -> RunReport:
    """Archive a run whose process left nobody to do so; one without a report is reported as crashed first.

    `sure` says that the run has ended; else it has to have been silent for `QUIET_S`.

    Raises:
        RunAtWork: it may still be at work.
        StorageFailed, StorageUnusable: the storage went on failing, or refused.
    """
    if not plan.dir.report.is_file():
        silent_s = time.time() - _last_written(plan.root)
        if not sure and silent_s < QUIET_S:
            raise RunAtWork(
                f"run {plan.run_id} has no report, and wrote its files {silent_s:.0f} s ago: expected {QUIET_S:g} s of "
                "silence of a run that has ended; wait, or say --ended"
            )
        report_interrupted(plan.dir, "crashed", "its process was gone and had left no report", "")
    return archive_reported(plan, read_report(plan.dir.report), settings)


def _last_written(root: Path) -> float:
    return max(path.stat().st_mtime for path in (root, *root.rglob("*")))


def _sources(plan: RunPlan) -> dict[str, Path]:
    kept = kept_checkpoints(plan.dir.checkpoints, plan.spec.archive.keep)
    return {
        "run.json": plan.dir.document,
        "completion.json": plan.dir.completion,
        "night.json": plan.dir.night,
        "night.jsonl": plan.dir.night_prompts,
        "vocab_map.safetensors": plan.dir.vocab_map,
        "export": plan.dir.export,
        "drafts": plan.dir.drafts,
        "metrics": plan.dir.metrics,
        "profiles": plan.dir.profiles,
        "attempts": plan.dir.root / "attempts",
        **{f"checkpoints/{path.name}": path for path in kept},
    }
