"""What is known of a run that was cut off, and what becomes of a report that another version wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from disagg_core.errors import RoleFailed, StoreUnavailable
from disagg_core.report import records
from disagg_core.report.records import last_progress, read_report, report_interrupted
from disagg_core.run.known import OtherVersion, UnknownRun, find_run, known_runs, read_plan
from disagg_core.run.metrics import JsonlMetrics
from disagg_core.run.outcomes import write_failure
from disagg_core.run.plan import RunPlan, make_plan
from disagg_core.run.progress import ProgressFile
from disagg_core.run_spec.document import RunSpec
from disagg_core.run_spec.yaml_file import load_spec
from disagg_core.target.facts import read_target_facts

pytestmark = pytest.mark.unit

SPEC = Path(__file__).resolve().parents[3] / "infra" / "runs" / "qwen3-8b-eagle3.yaml"


@pytest.fixture
def plan(tmp_path: Path) -> RunPlan:
    """A run that has passed its preflight."""
    spec = load_spec(SPEC)
    made = make_plan(
        spec, read_target_facts(spec.target), run_id="night-1", root=tmp_path / "night-1", total_prompts=100
    )
    made.root.mkdir()
    made.dir.document.write_text(made.model_dump_json())
    return made


def begin_attempt(plan: RunPlan, number: int, *, prompts: int, step: int, trained: int) -> Path:
    state = plan.dir.attempt(number).state
    ProgressFile(state / "producer.json").update(phase="capturing", prompts=prompts)
    ProgressFile(state / "consumer.json").update(phase="training", step=step, trained=trained, loss=3.5)
    return state


def test_a_cancelled_run_says_how_far_it_came_and_how_its_attempts_ended(plan: RunPlan) -> None:
    first = begin_attempt(plan, 1, prompts=40, step=1, trained=28)
    write_failure(first / "consumer-outcome.json", 0.0, StoreUnavailable("mooncake_master is gone"))
    write_failure(first / "producer-outcome.json", 0.0, RoleFailed("asked to stop", "preempted"))
    begin_attempt(plan, 2, prompts=70, step=2, trained=56)

    report = report_interrupted(plan.dir, "cancelled", "interrupted", "f-1")

    assert report is not None
    assert (report.state, report.flow_run_id) == ("cancelled", "f-1")
    assert report.progress is not None
    assert (report.progress.attempt, report.progress.prompts, report.progress.total_prompts) == (2, 70, 100)
    assert (report.progress.steps, report.progress.trained, report.progress.loss) == (2, 56, 3.5)
    assert [(a.failure_class, a.reason) for a in report.attempts] == [
        ("store_lost", "consumer: StoreUnavailable: mooncake_master is gone"),
        ("preempted", "interrupted"),
    ]
    assert read_report(plan.dir.report) == report
    markdown = (plan.root / "report.md").read_text()
    assert "# Run night-1: cancelled" in markdown
    for row in ("| attempt | 2 |", "| prompts captured | 70 of 100 |", "| samples trained | 56 in 2 of 4 steps |"):
        assert row in markdown
    assert "resumes from its newest checkpoint" in markdown
    page = (plan.root / "report.html").read_text()
    assert "70 of 100" in page
    assert "data:image/png;base64," in page
    assert "name: qwen3-8b-eagle3" in page, "the document with every default filled in"
    assert (plan.root / "report.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_says_where_the_time_of_both_sides_went_and_what_follows_from_it(plan: RunPlan) -> None:
    begin_attempt(plan, 1, prompts=40, step=2, trained=8)
    with JsonlMetrics(plan.dir.phases) as laps:
        laps.write(step=1, samples=4, refs_s=3.0, forward_s=1.0)
        laps.write(step=2, samples=4, refs_s=3.0, forward_s=1.0)
    with JsonlMetrics(plan.dir.rollout_metrics) as intervals:
        intervals.write(samples=8, workers=2, space_s=0.0, prefill_s=12.0, other_s=4.0, put_beside_s=2.5)

    report = report_interrupted(plan.dir, "cancelled", "interrupted", "f-1")

    assert report is not None
    assert report.time_spent is not None
    assert report.time_spent.training["refs"] == 6.0
    assert report.time_spent.bottleneck.startswith(
        "inference-bound: training waits 75% for features; capture is the slower side "
        "(capture 1.0, training 4.0 samples/s at most)"
    )
    markdown = (plan.root / "report.md").read_text()
    for row in (
        "| training | waiting for references | 6.0 | 75.0% |",
        "| capture | prefill | 12.0 | 75.0% |",
        "| beside capture | put, in threads of its own | 2.5 |  |",
    ):
        assert row in markdown


def test_a_cancelled_run_of_several_drafts_says_the_loss_of_each(plan: RunPlan) -> None:
    sections = [{"method": "eagle3"}, {"method": "dflash", "name": "flash"}]
    document = plan.spec.model_dump(mode="json") | {"draft": None, "drafts": sections}
    several = plan.model_copy(update={"spec": RunSpec.model_validate(document)})
    plan.dir.document.write_text(several.model_dump_json())
    state = begin_attempt(plan, 1, prompts=40, step=1, trained=28)
    ProgressFile(state / "consumer.json").update(
        phase="training", step=1, trained=28, **{"loss eagle3": 3.5, "loss flash": 1.25}
    )

    report = report_interrupted(plan.dir, "cancelled", "interrupted", "f-1")

    assert report is not None
    assert report.progress is not None
    assert (report.progress.loss, report.progress.losses) == (None, {"eagle3": 3.5, "flash": 1.25})
    assert "| loss | eagle3 3.500, flash 1.250 last |" in (plan.root / "report.md").read_text()
    assert (plan.root / "report.png").read_bytes().startswith(b"\x89PNG")


def test_an_attempt_that_has_hardly_begun_does_not_hide_what_was_trained_before(plan: RunPlan) -> None:
    begin_attempt(plan, 1, prompts=40, step=1, trained=28)
    state = plan.dir.attempt(2).state
    ProgressFile(state / "producer.json").update(phase="loading the target")
    ProgressFile(state / "consumer.json").update(phase="waiting for the vocabulary map", step=0)
    progress = last_progress(plan)
    assert progress is not None
    assert (progress.attempt, progress.prompts, progress.trained, progress.steps) == (2, 40, 28, 1)


def test_what_was_trained_was_captured_whatever_the_producer_had_time_to_say(plan: RunPlan) -> None:
    begin_attempt(plan, 1, prompts=20, step=1, trained=28)
    progress = last_progress(plan)
    assert progress is not None
    assert (progress.prompts, progress.trained) == (28, 28)


def test_a_run_that_has_its_report_keeps_it(plan: RunPlan) -> None:
    assert report_interrupted(plan.dir, "crashed", "its process was killed", "f") is not None
    assert report_interrupted(plan.dir, "cancelled", "cancelled", "f") is None
    assert read_report(plan.dir.report).state == "crashed"
    assert last_progress(plan) is None


def test_a_run_that_had_not_begun_has_no_report(plan: RunPlan) -> None:
    plan.dir.document.unlink()
    assert report_interrupted(plan.dir, "cancelled", "cancelled", "f") is None
    assert not plan.dir.report.exists()


def test_documents_of_another_version_are_named_with_the_difference(plan: RunPlan) -> None:
    report_interrupted(plan.dir, "crashed", "killed", "f")
    old = json.loads(plan.dir.report.read_bytes())
    del old["run_dir"]
    plan.dir.report.write_text(json.dumps(old))
    with pytest.raises(OtherVersion, match=r"report\.json: written by another version .*run_dir: Field required"):
        read_report(plan.dir.report)
    plan.dir.document.write_text("{}")
    with pytest.raises(OtherVersion, match=r"run\.json: written by another version"):
        read_plan(plan.dir)


def test_a_run_is_found_by_its_id_or_by_what_only_it_begins_with(tmp_path: Path) -> None:
    for run_id in ("night-1a2b", "night-1c3d", "night", "noon-77"):
        (tmp_path / run_id).mkdir()
        (tmp_path / run_id / "run.json").write_text("{}")
    (tmp_path / "not-begun").mkdir()
    assert [run.run_id for run in known_runs(tmp_path)] == ["night", "night-1a2b", "night-1c3d", "noon-77"]
    for name, run_id in (("night-1a2b", "night-1a2b"), ("night-1c", "night-1c3d"), ("no", "noon-77")):
        assert find_run(tmp_path, name).root == tmp_path / run_id
    assert find_run(tmp_path, "night").run_id == "night", "a whole id is no prefix"
    with pytest.raises(UnknownRun, match=r"'night-1' is the beginning of 2 runs .*: night-1a2b, night-1c3d"):
        find_run(tmp_path, "night-1")
    for name in ("dawn", "not-begun", "", "../night"):
        with pytest.raises(UnknownRun, match=r"no run .*; there are: night, night-1a2b, night-1c3d, noon-77"):
            find_run(tmp_path, name)


@pytest.mark.parametrize("damage", [b'{"step": 1, "lo{"step": 2, "loss": 1.0}\n', b"\0" * 4096 + b"\n", b"[1]\n"])
def test_a_damaged_metrics_file_does_not_cost_the_report(plan: RunPlan, damage: bytes) -> None:
    begin_attempt(plan, 1, prompts=40, step=1, trained=28)
    plan.dir.metrics.mkdir(parents=True)
    (plan.dir.metrics / "train.jsonl").write_bytes(b'{"step": 1, "loss": 2.0}\n' + damage)
    assert report_interrupted(plan.dir, "crashed", "its host died", "f") is not None
    assert (plan.root / "report.png").read_bytes().startswith(b"\x89PNG")
    assert read_report(plan.dir.report).state == "crashed"


def test_a_picture_that_cannot_be_drawn_does_not_cost_the_report(
    plan: RunPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        (plan.root / "report.png").write_bytes(b"half")
        raise ValueError("cannot convert float infinity to integer")

    monkeypatch.setattr(records, "plot_run", broken)
    assert report_interrupted(plan.dir, "crashed", "its host died", "f") is not None
    assert read_report(plan.dir.report).state == "crashed"
    assert "report.png" not in (plan.root / "report.md").read_text()
    assert "data:image" not in (plan.root / "report.html").read_text()
    assert not (plan.root / "report.png").exists()
