"""``draftline drafts`` from the command line, on a registry in a directory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from disagg_core.checks.preflight import prepare_run
from disagg_core.drafts.export import import_draft
from disagg_core.drafts.warm_start import vocabulary_of
from disagg_core.registry.registry import Registry
from disagg_core.run.plan import RunPlan
from disagg_core.run_spec.document import RunSpec
from disagg_core.run_spec.yaml_file import load_spec
from disagg_core.settings import Settings
from disagg_core.training.checkpoint import (
    CheckpointContent,
    DataCursor,
    DraftContent,
    DraftProgress,
    TrainerState,
    save_checkpoint,
)
from flows.cli import app as cli
from tests.unit.registry.conftest import DEMO, make_checkpoint, publish

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Ended:
    returncode: int
    stdout: str
    stderr: str


Drafts = Callable[..., Ended]


@pytest.fixture
def drafts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Drafts:
    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["draftline", "drafts", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        said = capsys.readouterr()
        return Ended(int(end.value.code or 0), said.out, said.err)

    return run


@pytest.fixture
def nights(registry: Registry, plan: RunPlan, tmp_path: Path) -> Registry:
    """Three nights' versions, the first of which is the champion."""
    document = plan.spec.model_dump(mode="json")
    for night in (1, 2, 3):
        changed = {**document, "run": {**document["run"], "name": f"night-{night}", "seed": night}}
        publish(registry, plan, tmp_path, f"night-{night}", seed=night, accept_length=2 + night / 10, document=changed)
    registry.promote(1, instead_of=None, by="us")
    return registry


def test_a_run_is_published_in_every_format(
    drafts: Drafts, settings: Settings, registry: Registry, tmp_path: Path
) -> None:
    plan = prepare_run(load_spec(DEMO, ["data.limit=40"]), "night-1", settings)
    first = make_checkpoint(tmp_path / "draft", plan)
    tensors = load_file(first / "draft.safetensors")
    config = json.loads((first / "config.json").read_text())
    state = TrainerState(
        step=3,
        samples=9,
        tokens=90,
        seed=0,
        total_steps=3,
        identity={},
        cursor=DataCursor(trained=[(0, 8)]),
        drafts={"": DraftProgress(step=3)},
    )
    content = CheckpointContent(drafts={"": DraftContent(tensors, config, optimizer={}, rng={})}, state=state)
    save_checkpoint(plan.dir.checkpoints, content, keep=1)
    ended = drafts("publish", "night")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("v1 of ")
    version = registry.verify(1)
    known = version.provenance
    assert known.formats == ("sglang", "hf", "speculators")
    for layout in known.formats:
        path = registry.fetch(1, f"export/{layout}", tmp_path / layout)
        assert torch.equal(import_draft(path).state["d2t"], tensors["d2t"])
    assert (known.run_id, known.tokenizer_version) == ("night-1", plan.tokenizer_version)
    assert known.vocab_map_version == vocabulary_of(import_draft(first)).version
    assert RunSpec.model_validate(known.document) == plan.spec
    assert "optimizer.safetensors" not in str(registry.files_of(1, "checkpoint"))


def test_versions_are_listed_with_the_champion(drafts: Drafts, nights: Registry) -> None:
    listed = drafts("list")
    assert listed.returncode == 0
    champions = [line for line in listed.stdout.splitlines() if "champion" in line]
    assert len(champions) == 1
    assert "v1" in champions[0]
    assert "night-1" in champions[0]
    found = json.loads(drafts("list", "--json").stdout)
    assert found["champion"] == 1
    assert [version["accept_length"] for version in found["versions"]] == [2.1, 2.2, 2.3]


def test_a_version_is_shown_with_its_history(drafts: Drafts, nights: Registry) -> None:
    assert "us promoted v1" in drafts("show", "champion").stdout
    shown = json.loads(drafts("show", "v2", "--json").stdout)
    assert shown["provenance"]["run_id"] == "night-2"
    assert shown["history"] == []


def test_a_difference_is_named_by_its_place_in_the_document(drafts: Drafts, nights: Registry) -> None:
    differences = {entry["what"]: entry for entry in json.loads(drafts("diff", "v1", "night-2", "--json").stdout)}
    assert set(differences) == {"accept_length", "document.run.seed", "content"}
    assert (differences["document.run.seed"]["one"], differences["document.run.seed"]["other"]) == (1, 2)
    assert "document.run.seed" in drafts("diff", "v1", "v2").stdout
    assert drafts("diff", "v1", "v1").stdout == "v1 and v1 do not differ\n"


def test_the_champion_is_moved_and_moved_back(drafts: Drafts, nights: Registry) -> None:
    promoted = drafts("promote", "latest", "--reason", "better")
    assert promoted.returncode == 0
    assert "promoted v3 in place of v1: better" in promoted.stdout
    late = drafts("promote", "v2", "--instead-of", "v1")
    assert late.returncode == 1
    assert "v2 was to take the place of v1, but" in late.stderr
    assert "promoted v3" in late.stderr
    assert "the champion already" in drafts("promote", "v3").stderr
    assert "rolled back to v1 in place of v3" in drafts("rollback").stdout
    assert drafts("rollback").returncode == 2
    history = json.loads(drafts("history", "--json").stdout)
    assert [event["version"] for event in history] == [1, 3, 1]
    assert "better" in drafts("history").stdout


def test_a_server_gets_the_champion_by_one_command(nights: Registry, tmp_path: Path) -> None:
    """Standard output is the path and nothing else, also for a real process."""
    command = [sys.executable, "-m", "flows.cli.app", "drafts", "fetch", "champion", "--to", str(tmp_path / "models")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    path = Path(ended.stdout.removesuffix("\n"))
    assert path == tmp_path / "models" / f"{nights.name}-v1-sglang"
    exported = (tmp_path / "night-1-export" / "model.safetensors").read_bytes()
    assert (path / "model.safetensors").read_bytes() == exported
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert again.stdout == ended.stdout


def test_a_run_exports_any_draft_by_its_reference(
    nights: Registry, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_run(load_spec(DEMO, ["data.limit=40"]), "tonight", settings)
    out = tmp_path / "exported"
    command = ["draftline", "export", "tonight", "--draft", "champion", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    exported = (tmp_path / "night-1-export" / "model.safetensors").read_bytes()
    assert (out / "model.safetensors").read_bytes() == exported


def test_what_cannot_be_fetched_is_said(drafts: Drafts, nights: Registry, tmp_path: Path) -> None:
    assert "expected one of sglang of v1, found hf" in drafts("fetch", "v1", "--to", "x", "--format", "hf").stderr
    place = tmp_path / "models" / f"{nights.name}-v1-sglang"
    place.mkdir(parents=True)
    (place / "config.json").write_text("{}")
    refused = drafts("fetch", "v1", "--to", str(tmp_path / "models"))
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert "expected no directory, or an undamaged copy" in refused.stderr


def test_an_empty_registry_says_so(drafts: Drafts, tmp_path: Path) -> None:
    ended = drafts("list", "--registry", str(tmp_path / "nothing"))
    assert ended.returncode == 2
    assert "there are none" in ended.stderr
