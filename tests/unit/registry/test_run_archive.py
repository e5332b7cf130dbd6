"""What the archive of a run holds, and that of a run whose own process could not make it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from disagg_core.registry import run_archive
from disagg_core.registry.run_archive import QUIET_S, RunAtWork, add_report, archive_directory, archive_ended
from disagg_core.report.archive import verify_archive
from disagg_core.report.records import read_report, report_interrupted
from disagg_core.run.plan import RunPlan, make_plan
from disagg_core.run.progress import ProgressFile
from disagg_core.run_spec.yaml_file import load_spec
from disagg_core.settings import Settings, get_settings
from disagg_core.storage.place import StorageFailed
from disagg_core.target.facts import read_target_facts
from flows.cli import app as cli
from tasks.interruption import end_interrupted

pytestmark = pytest.mark.unit

SPEC = Path(__file__).resolve().parents[3] / "infra" / "runs" / "qwen3-8b-eagle3.yaml"


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    monkeypatch.setenv("DRAFTLINE_HOME", str(tmp_path))
    get_settings.cache_clear()
    yield get_settings()
    get_settings.cache_clear()


@pytest.fixture
def plan(settings: Settings) -> RunPlan:
    """A run that was killed in its first attempt, with everything that runs leave."""
    spec = load_spec(SPEC, ["tracking.tensorboard=false"])
    root = settings.runs_dir / "night-1"
    made = make_plan(spec, read_target_facts(spec.target), run_id="night-1", root=root, total_prompts=100)
    state = made.dir.attempt(1).state
    ProgressFile(state / "producer.json").update(phase="capturing", prompts=40)
    ProgressFile(state / "consumer.json").update(phase="training", step=1, trained=28, loss=3.5)
    files = {
        "run.json": made.model_dump_json(),
        "vocab_map.safetensors": "map",
        "metrics/train.jsonl": '{"step": 1, "loss": 3.5}\n',
        "metrics/rollout.jsonl": "{}\n",
        "attempts/1/logs/consumer.log": "redis://:open-sesame@host refused\n",
        "attempts/1/state/rejected.jsonl": '{"ordinal": 3, "reason": "too long"}\n',
        "attempts/1/state/quarantined.jsonl": '{"ordinal": 5, "reason": "not finite"}\n',
        "attempts/1/state/consumer-environment.json": "{}",
        "checkpoints/step-1/draft.safetensors": "weights",
        "checkpoints/step-1/trainer.json": "{}",
        "checkpoints/step-1/manifest.json": "{}",
        "tensorboard/events.out.tfevents.1": "events",
        "night.jsonl": '{"prompt": "x"}\n',
        "tracking/wandb/debug.log": "of no use to anybody else",
    }
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return made


def archived(plan: RunPlan, settings: Settings) -> dict[str, object]:
    manifest: dict[str, object] = json.loads((settings.home / "archive" / plan.run_id / "manifest.json").read_text())
    return manifest


def test_an_archive_holds_what_repeats_or_judges_the_run(plan: RunPlan, settings: Settings) -> None:
    (plan.root / "completion.json").write_text('{"accounting": {}}')
    (plan.root / "export").mkdir()
    (plan.root / "export" / "model.safetensors").write_text("weights")
    archive = archive_directory(plan, settings, complete=True)
    report_interrupted(plan.dir, "crashed", "killed", "f")
    plan.dir.evaluation.mkdir()
    (plan.dir.evaluation / "after.json").write_text("{}")
    plan.dir.gate.write_text("{}")
    add_report(plan, archive)
    held = {
        "what was asked for, on which data, target and tokenizer": ["run.json", "night.jsonl", "vocab_map.safetensors"],
        "what came of it": ["checkpoints/step-1/draft.safetensors", "export/model.safetensors"],
        "how it went": ["metrics/train.jsonl", "metrics/rollout.jsonl", "tensorboard/events.out.tfevents.1"],
        "what it came to": ["report.json", "report.md", "report.html", "report.png", "completion.json", "gate.json"],
        "what was measured": ["evaluation/after.json"],
        "what was left out, and why": ["attempts/1/state/rejected.jsonl", "attempts/1/state/quarantined.jsonl"],
        "what its processes said": ["attempts/1/logs/consumer.log", "attempts/1/state/producer.json"],
        "what it ran in": ["environment.json", "attempts/1/state/consumer-environment.json"],
    }
    files = archived(plan, settings)["files"]
    assert isinstance(files, dict)
    for what, names in held.items():
        assert set(names) <= set(files), what
    assert not any(name.startswith("tracking/") for name in files)
    environment = json.loads((Path(archive.url) / "environment.json").read_text())
    assert {"packages", "revision", "gpus", "sglang", "mooncake", "variables"} <= set(environment)
    assert environment["mooncake"]
    assert "open-sesame" not in (Path(archive.url) / "attempts" / "1" / "logs" / "consumer.log").read_text()
    assert verify_archive(archive.url) == len(files)


def test_a_run_that_was_killed_with_its_worker_is_archived_by_command(
    plan: RunPlan, settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RunAtWork, match=r"night-1 has no report, and wrote its files \d+ s ago: .* or say --ended"):
        archive_ended(plan, settings)
    assert not plan.dir.report.exists()
    long_ago = time.time() - QUIET_S - 1
    for path in [plan.root, *plan.root.rglob("*")]:
        os.utime(path, (long_ago, long_ago))
    monkeypatch.setattr("sys.argv", ["draftline", "archive", "create", "night"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert "night-1 (crashed): " in capsys.readouterr().out
    report = read_report(plan.dir.report)
    assert report.archive is not None
    assert verify_archive(report.archive.url) > 10
    about = archived(plan, settings)["about"]
    assert isinstance(about, dict)
    assert (about["run_id"], about["complete"]) == ("night-1", False)


def test_a_cancelled_run_is_archived_once_by_whoever_finds_it_first(plan: RunPlan, settings: Settings) -> None:
    end_interrupted(plan.dir, "cancelled", "interrupted", "f-1")
    report = read_report(plan.dir.report)
    assert (report.state, report.archive is not None) == ("cancelled", True)
    made = archived(plan, settings)
    end_interrupted(plan.dir, "crashed", "its process was killed", "f-1")
    assert read_report(plan.dir.report) == report
    assert archived(plan, settings) == made


def test_an_archive_that_was_away_is_made_up_for_by_the_next_who_looks(
    plan: RunPlan, settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(*_: object) -> None:
        raise StorageFailed("s3://drafts: no route to host")

    with monkeypatch.context() as patched:
        patched.setattr(run_archive, "archive_reported", away)
        end_interrupted(plan.dir, "cancelled", "interrupted", "f-1")
    assert "no route to host; `draftline archive create night-1` does it" in caplog.text
    assert read_report(plan.dir.report).archive is None
    end_interrupted(plan.dir, "cancelled", "interrupted", "f-1")
    found = read_report(plan.dir.report).archive
    assert found is not None
    assert verify_archive(found.url) > 10


def test_a_run_that_had_not_begun_leaves_nothing(plan: RunPlan, settings: Settings) -> None:
    plan.dir.document.unlink()
    end_interrupted(plan.dir, "cancelled", "cancelled", "f-1")
    assert not (settings.home / "archive").exists()
