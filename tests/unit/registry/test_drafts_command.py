"""``draftline drafts`` from the command line, on a registry in a directory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from disagg_core.registry.registry import Registry
from disagg_core.run.plan import RunPlan
from flows.cli import app as cli
from tests.unit.registry.conftest import publish

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
