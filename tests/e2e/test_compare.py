"""The document that compares methods, made small: four drafts from one rollout, each trained, measured and archived."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from disagg_core.drafts.export import import_draft
from disagg_core.report.archive import verify_archive
from tests.kit.runs import ROOT, Draftline, Ours, report_of, settings

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600), pytest.mark.slow]

SMALL = {
    "data.limit": 44,
    "data.max_tokens": 96,
    "data.generate.max_new_tokens": 12,
    "training.save_every_steps": 2,
    "evaluation.prompts": 4,
    "evaluation.max_new_tokens": 16,
}
METHODS = {"eagle3", "dflash", "dflash2", "dspark"}


def test_four_methods_are_compared_at_equal_samples(home: Path, draftline: Draftline, ours: Ours) -> None:
    changes = settings(*(f"{key}={value}" for key, value in SMALL.items()))
    run = draftline("run", str(ROOT / "infra/runs/compare.yaml"), *changes)
    output, _ = run.communicate(timeout=580)
    assert run.returncode == 0, output

    report = report_of(home)
    assert report.state == "completed"
    assert report.accounting is not None
    assert (report.accounting.published, report.accounting.trained, report.accounting.store_keys_left) == (44, 44, 0)
    assert report.training is not None
    assert report.evaluation is None
    assert {draft.name for draft in report.drafts} == METHODS
    for draft in report.drafts:
        assert (draft.steps, draft.skipped) == (report.training.steps, 0)
        assert draft.evaluation is not None
        assert draft.evaluation.lossless
        assert len(draft.evaluation.per_position_after) == 7
        assert draft.export is not None
        assert import_draft(Path(draft.export)).method.name == draft.method
        assert f"draft {draft.name}" in output
    run_dir = home / "runs" / report.run_id
    assert "| draft | parameters | loss | accept length (95 %) |" in (run_dir / "report.md").read_text()
    assert (run_dir / "report.png").read_bytes().startswith(b"\x89PNG")
    assert report.archive is not None
    archived = json.loads((Path(report.archive.url) / "manifest.json").read_text())["files"]
    assert verify_archive(report.archive.url) == len(archived)
    last = f"checkpoints/step-{report.training.steps}"
    for name in METHODS:
        expected = {f"drafts/{name}/export/config.json", f"drafts/{name}/metrics/train.jsonl"}
        assert {*expected, f"{last}/{name}/draft.safetensors", f"evaluation/{name}-after.json"} <= set(archived)
    assert ours() == []
