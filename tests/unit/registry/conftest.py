"""A directory as registry, and real drafts of the demo's target to keep in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from disagg_core.checks.preflight import sketch_plan
from disagg_core.drafts.eagle3 import Eagle3Config, Eagle3Draft
from disagg_core.drafts.export import export_draft
from disagg_core.drafts.vocab import VocabMap
from disagg_core.registry.references import open_registry
from disagg_core.registry.registry import Registry
from disagg_core.registry.versions import Provenance, Version
from disagg_core.run.plan import RunPlan
from disagg_core.run_spec.yaml_file import load_spec
from disagg_core.settings import Settings, get_settings

DEMO = Path(__file__).resolve().parents[3] / "infra" / "runs" / "demo.yaml"


@pytest.fixture
def settings() -> Settings:
    return get_settings()


@pytest.fixture
def plan(settings: Settings) -> RunPlan:
    return sketch_plan(load_spec(DEMO, ["data.limit=40"]), settings)


@pytest.fixture
def registry(plan: RunPlan, settings: Settings) -> Registry:
    return open_registry(plan.spec, settings)


def make_checkpoint(where: Path, plan: RunPlan, *, seed: int = 0, tokens: int | None = None) -> Path:
    """Write a draft with random weights and a vocabulary of `tokens` random tokens of the target."""
    torch.manual_seed(seed)
    size = tokens or plan.drafts[0].vocabulary.size
    section = plan.spec.draft.model_copy(update={"vocab_size": size})
    draft = Eagle3Draft(Eagle3Config.for_target(plan.target, section, plan.capture.layers))
    draft.set_vocab_map(VocabMap.from_counts(torch.randint(0, 1000, (plan.target.vocab_size,)), size))
    where.mkdir(parents=True)
    save_file(draft.serving_state_dict(), where / "draft.safetensors")
    (where / "config.json").write_text(json.dumps(draft.config.to_dict()))
    return where


def publish(
    registry: Registry, plan: RunPlan, where: Path, run_id: str, *, seed: int = 0, **changed: object
) -> Version:
    checkpoint = make_checkpoint(where / run_id, plan, seed=seed)
    export = where / f"{run_id}-export"
    export_draft(checkpoint, export, "sglang")
    known = {
        "run_id": run_id,
        "method": "eagle3",
        "target": plan.spec.target.model,
        "target_version": plan.target.version,
        "tokenizer_version": "k",
        "vocab_map_version": "m",
        "draft_vocab_size": plan.drafts[0].vocabulary.size,
        "layers": plan.capture.layers,
        "formats": ("sglang",),
        "created": 1.0,
        "document": plan.spec.model_dump(mode="json"),
        **changed,
    }
    return registry.publish({"checkpoint": checkpoint, "export/sglang": export}, Provenance.model_validate(known))
