"""From a trained run to a version of the registry: every serving format, the draft in fp32, and where it comes from."""

from __future__ import annotations

import time
from importlib import metadata
from pathlib import Path

from disagg_core.drafts.export import CONFIG, VerifierInfo, export_draft, import_draft
from disagg_core.drafts.tensor_files import CHECKPOINT_WEIGHTS
from disagg_core.drafts.warm_start import vocabulary_of
from disagg_core.registry.registry import CHECKPOINT, EXPORT, REPORT, Registry
from disagg_core.registry.versions import DataMark, Provenance, Version
from disagg_core.report.records import REPORT_FILES
from disagg_core.run.plan import PlannedDraft, RunPlan


def publish_draft(
    registry: Registry,
    plan: RunPlan,
    draft: PlannedDraft,
    checkpoint: Path,
    *,
    accept_length: float | None = None,
    archive: str | None = None,
    mark: DataMark | None = None,
) -> Version:
    """Keep a draft of a run, as its checkpoint has it, as a version.

    Args:
        registry: of the run's target.
        plan: the run.
        draft: which of its drafts.
        checkpoint: directory of the draft in a checkpoint of the run.
        accept_length: as it was measured.
        archive: URL of the run's archive.
        mark: how far a night of recurring training came in its source.

    Raises:
        IncompatibleDraft: the draft cannot be exported.
        VersionExists: the run has a version of this draft, with other weights.
        StorageFailed, StorageUnusable: the storage went on failing, or refused.
    """
    exports = plan.root / "exports" / draft.name
    for name, known in draft.method.formats.items():
        verifier = VerifierInfo.of(plan.spec.target) if known.names_target else None
        tokens = plan.spec.evaluation.draft_tokens
        export_draft(checkpoint, exports / name, name, verifier=verifier, draft_tokens=tokens)
    sources = {
        f"{CHECKPOINT}/{CHECKPOINT_WEIGHTS}": checkpoint / CHECKPOINT_WEIGHTS,
        f"{CHECKPOINT}/{CONFIG}": checkpoint / CONFIG,
        EXPORT: exports,
        f"{REPORT}/run.json": plan.dir.document,
        f"{REPORT}/evaluation": plan.dir.evaluation,
        **{f"{REPORT}/{name}": plan.root / name for name in REPORT_FILES},
    }
    return registry.publish(sources, _provenance(plan, draft, checkpoint, accept_length, archive, mark))


def _provenance(
    plan: RunPlan,
    draft: PlannedDraft,
    checkpoint: Path,
    accept_length: float | None,
    archive: str | None,
    mark: DataMark | None,
) -> Provenance:
    imported = import_draft(checkpoint)
    return Provenance(
        run_id=plan.run_id,
        draft=draft.name,
        method=imported.method.name,
        target=plan.spec.target.model,
        target_version=plan.target.version,
        tokenizer_version=plan.tokenizer_version,
        vocab_map_version=vocabulary_of(imported).version,
        draft_vocab_size=imported.config.draft_vocab_size,
        layers=draft.capture.layers,
        formats=tuple(imported.method.formats),
        parent=draft.warm_start.pinned if draft.warm_start is not None else draft.section.init_from,
        data=mark,
        accept_length=accept_length,
        archive=archive,
        created=time.time(),
        draftline=metadata.version("draftline"),
        document=plan.spec.model_dump(mode="json"),
    )
