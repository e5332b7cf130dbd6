"""The drafts that a consumer begins with: as their own sections say, whichever others are trained beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from disagg_core.checks.preflight import draft_configs
from disagg_core.drafts.export import export_draft
from disagg_core.drafts.method import DraftModel
from disagg_core.drafts.vocab import VocabMap
from disagg_core.errors import IncompatibleDraft
from disagg_core.roles.consumer import _build_draft
from disagg_core.run.plan import RunPlan, make_plan
from disagg_core.run_spec.yaml_file import load_spec
from disagg_core.target.facts import read_target_facts

pytestmark = pytest.mark.unit

RUNS = Path(__file__).resolve().parents[3] / "infra" / "runs"
FLASH = {"method": "dflash", "block_size": 8, "num_layers": 2, "mask_token_id": 3}
AUX = {"aux_layers": [0, 2]}


def plan_of(folder: Path, *drafts: dict[str, object]) -> RunPlan:
    """The plan of a run on the demo's target, read from a document in `folder`."""
    document = yaml.safe_load((RUNS / "demo.yaml").read_text())
    del document["draft"]
    for section, key in (("target", "model"), ("data", "prompts"), ("data", "holdout")):
        document[section][key] = str((RUNS / document[section][key]).resolve())
    (folder / "run.yaml").write_text(yaml.safe_dump(document | {"drafts": list(drafts)}))
    spec = load_spec(folder / "run.yaml")
    return make_plan(spec, read_target_facts(spec.target), run_id="x", root=folder / "x", total_prompts=8)


def built(plan: RunPlan, seed: int = 7) -> list[DraftModel]:
    vocabulary = VocabMap.identity(plan.target.vocab_size)
    return [_build_draft(draft, vocabulary, seed) for draft in plan.drafts]


def same(left: DraftModel, right: DraftModel) -> bool:
    mine, theirs = left.serving_state_dict(), right.serving_state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """The export of a DFlash draft for the demo's target."""
    plan = plan_of(tmp_path, FLASH)
    (draft,) = built(plan, seed=3)
    step = tmp_path / "step"
    step.mkdir()
    save_file(draft.serving_state_dict(), step / "draft.safetensors")
    (step / "config.json").write_text(json.dumps(draft.config.to_dict()))
    return export_draft(step, tmp_path / "published", dtype="float32").path


def test_a_fresh_draft_is_the_same_alone_and_beside_others(tmp_path: Path) -> None:
    eagle = {"method": "eagle3"}
    (alone,) = built(plan_of(tmp_path, FLASH))
    first, last = built(plan_of(tmp_path, eagle, FLASH))[1], built(plan_of(tmp_path, FLASH, eagle))[0]
    assert same(first, alone)
    assert same(last, alone)


def test_a_run_document_continues_a_dflash_draft_as_dflash2(tmp_path: Path, published: Path) -> None:
    """Beside the draft that it comes from; the additions have the sizes that the document says, and do nothing yet."""
    onward = {"method": "dflash2", "init_from": "published", "selector_rank": 16, "selector_top_k": 8}
    plan = plan_of(tmp_path, {"method": "dflash", "init_from": "published"} | AUX, onward | AUX)

    plain, draft = built(plan)

    assert [config.to_dict()["architectures"] for _, config in draft_configs(plan)] == [
        ["DFlashDraftModel"],
        ["DFlash2DraftModel"],
    ]
    found = draft.serving_state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in plain.serving_state_dict().items())
    assert found["candidate_selector.successor_codebook"].shape == (plan.target.vocab_size, 16)
    assert not found["candidate_selector.successor_codebook"].any()
    assert not any(tensor.any() for name, tensor in found.items() if "kernel_projection" in name)


def test_what_is_continued_has_to_fit_the_draft_that_continues_it(tmp_path: Path, published: Path) -> None:
    with pytest.raises(IncompatibleDraft, match="expected a draft of method dspark, found dflash"):
        draft_configs(plan_of(tmp_path, {"method": "dspark", "init_from": "published"} | AUX))
    other = {"method": "dflash2", "init_from": "published", "aux_layers": [1, 2]}
    with pytest.raises(IncompatibleDraft, match=r"captured layers: expected \(1, 2\), found \(0, 2\)"):
        draft_configs(plan_of(tmp_path, other))
