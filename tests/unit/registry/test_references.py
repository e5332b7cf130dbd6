"""Whatever people call a draft, it is found, checked, and fixed for the whole run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import fsspec
import pytest
import torch

from disagg_core.checks.preflight import check_run, prepare_run, sketch_plan
from disagg_core.drafts.export import import_draft
from disagg_core.drafts.warm_start import vocabulary_of
from disagg_core.errors import IncompatibleDraft
from disagg_core.prompts.pool import GivenTasks
from disagg_core.registry.references import References, UnknownDraft, registry_name
from disagg_core.registry.registry import Registry
from disagg_core.registry.versions import UnknownVersion
from disagg_core.report.archive import archive_files
from disagg_core.rollout.vocab_counts import vocab_maps_of
from disagg_core.run.plan import RunPlan
from disagg_core.run_spec.document import RunSpec
from disagg_core.run_spec.yaml_file import load_spec
from disagg_core.settings import Settings
from disagg_core.storage.trees import TreeDamaged
from tests.unit.registry.conftest import DEMO, make_checkpoint, publish

pytestmark = pytest.mark.unit


@pytest.fixture
def references(plan: RunPlan, settings: Settings) -> References:
    return References.of(plan.spec, settings)


def same_draft(one: Path, other: Path) -> bool:
    first, second = import_draft(one).state, import_draft(other).state
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_versions_are_found_by_word_number_and_run(
    registry: Registry, references: References, plan: RunPlan, tmp_path: Path
) -> None:
    with pytest.raises(UnknownVersion, match="no champion; its versions: none"):
        references.find("champion")
    for night in (1, 2):
        publish(registry, plan, tmp_path, f"night-{night}", seed=night)
    registry.promote(1, instead_of=None, by="us")
    for reference, run_id in {
        "champion": "night-1",
        "latest": "night-2",
        "v1": "night-1",
        "2": "night-2",
        "night-2": "night-2",
    }.items():
        found = references.find(reference)
        assert same_draft(found.path, tmp_path / run_id), reference
        assert found.version is not None
        assert found.version.provenance.run_id == run_id
        assert references.find(found.pinned).path.is_dir()
    with pytest.raises(UnknownVersion, match=r"'night' is the beginning of 2 runs"):
        references.find("night")
    with pytest.raises(UnknownVersion, match=r"no version v7; there are: v1, v2"):
        references.find("v7")


def test_a_directory_a_url_an_archive_and_a_version_hold_a_draft(
    registry: Registry, references: References, plan: RunPlan, tmp_path: Path, settings: Settings
) -> None:
    draft = make_checkpoint(tmp_path / "draft", plan)
    assert references.find(str(draft)).path == draft
    fsspec.filesystem("memory").put(f"{draft}/", "/drafts/mine/", recursive=True)
    remote = references.find("memory://drafts/mine")
    assert same_draft(remote.path, draft)
    assert remote.path.parent == settings.drafts_cache
    assert references.find("memory://drafts/mine") == remote

    archive_files({"checkpoints/step-2": draft, "run.json": draft / "config.json"}, "memory://archive/run-1")
    assert same_draft(references.find("memory://archive/run-1").path, draft)
    version = publish(registry, plan, tmp_path, "night-1", seed=3)
    assert same_draft(references.find(registry.url_of(version.number)).path, tmp_path / "night-1")
    with pytest.raises(UnknownDraft, match="expected a draft"):
        references.find("memory://drafts/nothing")


def test_what_means_nothing_says_what_could_be_meant(references: References) -> None:
    with pytest.raises(
        UnknownDraft, match=r"tonight: expected champion, latest, a version such as v3.*runs in .*: none"
    ):
        references.find("tonight")


def test_a_draft_on_the_hub_is_fixed_to_its_commit(
    references: References, plan: RunPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's own cache, as a download leaves it, and its client offline."""
    commit = "0" * 39 + "1"
    repository = tmp_path / "hub" / "models--somebody--draft"
    make_checkpoint(repository / "snapshots" / commit, plan)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    found = references.find("somebody/draft")
    assert found.pinned == f"somebody/draft@{commit}"
    assert same_draft(found.path, repository / "snapshots" / commit)
    assert references.find(found.pinned).path == found.path
    with pytest.raises(UnknownDraft, match="nobody/draft: cannot be fetched"):
        references.find("nobody/draft")


def test_a_damaged_copy_is_fetched_again_and_a_damaged_version_refused(
    registry: Registry, references: References, plan: RunPlan, tmp_path: Path
) -> None:
    publish(registry, plan, tmp_path, "night-1")
    copy = references.find("latest").path
    (copy / "draft.safetensors").write_bytes(b"rot")
    assert same_draft(references.find("latest").path, tmp_path / "night-1")
    shutil.rmtree(copy)
    kept = next(Path(registry.place.url).rglob("checkpoint/draft.safetensors"))
    kept.write_bytes(b"rot")
    with pytest.raises(TreeDamaged, match=r"checkpoint/draft\.safetensors: expected \d+ bytes, found 3"):
        references.find("latest")


def test_the_name_of_a_target_in_the_registry(plan: RunPlan) -> None:
    def named(model: str) -> str:
        target = plan.spec.target.model_copy(update={"model": model})
        return registry_name(plan.spec.model_copy(update={"target": target}))

    assert named("Qwen/Qwen3-8B") == "Qwen--Qwen3-8B"
    assert named("/models/my model") == "my-model"
    assert registry_name(load_spec(DEMO, ["registry.name=small"])) == "small"


# --- in a run ---------------------------------------------------------------------------------------------------------


def continued(reference: str, *overrides: str) -> RunSpec:
    return load_spec(DEMO, ["data.limit=40", "draft.vocab_size=null", f"draft.init_from={reference}", *overrides])


def test_a_run_goes_on_from_the_champion_it_was_planned_with(
    registry: Registry, plan: RunPlan, tmp_path: Path, settings: Settings
) -> None:
    for night in (1, 2):
        publish(registry, plan, tmp_path, f"night-{night}", seed=night)
    registry.promote(1, instead_of=None, by="us")
    planned = prepare_run(continued("champion"), "night-3", settings)
    registry.promote(2, instead_of=1, by="us")
    again = prepare_run(continued("champion"), "night-3", settings)
    assert again == planned
    source = planned.drafts[0].init_path
    assert source is not None
    assert same_draft(source, tmp_path / "night-1")
    other = prepare_run(continued("champion"), "night-4", settings)
    assert same_draft(other.warm_starts["champion"].path, tmp_path / "night-2")

    shutil.rmtree(source)
    restored = prepare_run(continued("champion"), "night-3", settings)
    assert restored == planned
    assert same_draft(source, tmp_path / "night-1")


def test_a_continued_draft_keeps_its_vocabulary(plan: RunPlan, tmp_path: Path, settings: Settings) -> None:
    draft = make_checkpoint(tmp_path / "draft", plan, tokens=24)
    kept = sketch_plan(continued(str(draft)), settings)
    assert kept.drafts[0].vocabulary.size == 24

    def no_target_needed(done: int, total: int | None) -> None:
        raise AssertionError("nothing is counted")

    (made,) = vocab_maps_of(kept, GivenTasks([]), None, cache=tmp_path / "cache", progress=no_target_needed)  # type: ignore[arg-type]
    assert made.version == vocabulary_of(import_draft(draft)).version
    assert len(made.target_ids) == 24

    resized = sketch_plan(continued(str(draft), "draft.vocab_size=16"), settings)
    assert resized.drafts[0].vocabulary.size == 16


def test_what_does_not_fit_is_said_before_the_run(
    registry: Registry, plan: RunPlan, tmp_path: Path, settings: Settings
) -> None:
    with pytest.raises(IncompatibleDraft, match=r"draft\.init_from: .*no champion"):
        check_run(continued("champion"), settings)
    draft = make_checkpoint(tmp_path / "draft", plan)
    config = json.loads((draft / "config.json").read_text())
    config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] = [0, 1, 3]
    (draft / "config.json").write_text(json.dumps(config))
    with pytest.raises(IncompatibleDraft, match=r"init_from: .*captured layers: expected .*, found \(0, 1, 3\)"):
        check_run(continued(str(draft)), settings)


def test_a_reference_in_a_document_is_no_path_unless_it_looks_like_one(tmp_path: Path) -> None:
    (tmp_path / "beside").mkdir()
    document = tmp_path / "run.yaml"
    document.write_text(DEMO.read_text())

    def init_from(value: str) -> str | None:
        return load_spec(document, ["draft.vocab_size=null", f"draft.init_from={value}"]).all_drafts[0].init_from

    assert init_from("champion") == "champion"
    assert init_from("v3") == "v3"
    assert init_from("somebody/draft") == "somebody/draft"
    assert init_from("./there") == str(tmp_path / "there")
    assert init_from("beside") == str(tmp_path / "beside")
    assert init_from("s3://bucket/drafts") == "s3://bucket/drafts"
