"""A run is repeated from its archive, or it is said why it would be another."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from disagg_core.checks.preflight import check_run, prepare_run
from disagg_core.checks.repeat import NotRepeatable, archived_plan, check_repeats, repeated_spec
from disagg_core.errors import BadInput
from disagg_core.registry.references import open_registry
from disagg_core.report.archive import archive_files
from disagg_core.report.run_comparison import compare_runs
from disagg_core.run.known import OtherVersion
from disagg_core.run.plan import RunPlan
from disagg_core.run_spec.yaml_file import load_spec
from disagg_core.settings import Settings, get_settings
from disagg_core.storage.place import open_place
from flows.cli import app as cli
from tests.unit.registry.conftest import DEMO, publish

pytestmark = pytest.mark.unit


@pytest.fixture
def settings() -> Settings:
    return get_settings()


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    lines = (DEMO.parents[1] / "demo" / "prompts.jsonl").read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:120]))
    return path


def archived(plan: RunPlan, url: str) -> str:
    return archive_files({"run.json": plan.dir.document}, url).url


def test_the_document_of_an_archive_plans_the_same_run(settings: Settings, prompts: Path, tmp_path: Path) -> None:
    spec = load_spec(DEMO, [f"data.prompts={prompts}", "data.holdout=null"])
    plan = prepare_run(spec, "night-1", settings)
    known = archived_plan(open_place(archived(plan, str(tmp_path / "archive"))))
    again = repeated_spec(known)
    assert again == plan.spec
    check_repeats(known, check_run(again, settings))

    changed = repeated_spec(known, ["run.seed=7"])
    assert changed.run.seed == 7

    prompts.write_bytes(prompts.read_bytes() * 2)
    with pytest.raises(
        NotRepeatable, match=r"night-1 cannot be repeated here: .*data\.prompts\.size: expected \d+, found"
    ):
        check_repeats(known, check_run(again, settings))


def test_the_draft_that_was_the_champion_then_is_continued_again(settings: Settings, tmp_path: Path) -> None:
    spec = load_spec(DEMO, ["data.limit=40", "draft.vocab_size=null", "draft.init_from=champion"])
    fresh = check_run(load_spec(DEMO, ["data.limit=40"]), settings)
    registry = open_registry(spec, settings)
    for night in (1, 2):
        publish(registry, fresh, tmp_path, f"night-{night}", seed=night)
    registry.promote(1, instead_of=None, by="us")
    known = prepare_run(spec, "night-3", settings)
    registry.promote(2, instead_of=1, by="us")
    again = check_run(repeated_spec(known), settings)
    (continued,) = again.warm_starts.values()
    assert continued.path == known.warm_starts["champion"].path
    check_repeats(known, again)


def test_what_is_no_archive_of_a_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"expected a run's archive with run\.json"):
        archived_plan(open_place(str(tmp_path)))
    (tmp_path / "run.json").write_text('{"run_id": "old"}')
    with pytest.raises(OtherVersion, match="repeat it with that one"):
        archived_plan(open_place(str(tmp_path)))


def test_two_runs_side_by_side(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    urls = []
    for number, seed in enumerate((0, 7), start=1):
        plan = prepare_run(load_spec(DEMO, ["data.limit=40", f"run.seed={seed}"]), f"night-{number}", settings)
        steps = [{"step": step, "loss": 5.0 - number - step / 100} for step in range(1, 31)]
        folder = tmp_path / f"made-{number}"
        (folder / "metrics").mkdir(parents=True)
        (folder / "metrics" / "train.jsonl").write_text("".join(f"{json.dumps(step)}\n" for step in steps) + '{"step"')
        (folder / "report.json").write_text(json.dumps({"evaluation": {"accept_length_after": 2.0 + number}}))
        (folder / "environment.json").write_text(json.dumps({"packages": {"torch": f"2.{number}"}}))
        parts = {name: folder / name for name in ("metrics", "report.json", "environment.json")}
        urls.append(archive_files({"run.json": plan.dir.document, **parts}, f"memory://runs/night-{number}").url)

    found = compare_runs(*(open_place(url) for url in urls))
    assert [(entry.what, entry.one, entry.other) for entry in found.document] == [("spec.run.seed", 0, 7)]
    assert (found.data, found.identity) == ([], [])
    assert [entry.what for entry in found.versions] == ["packages.torch"]
    assert [(entry.what, entry.one, entry.other) for entry in found.results] == [
        ("evaluation.accept_length_after", 3.0, 4.0)
    ]
    assert [point.step for point in found.curves][::9] == [1, 30]
    assert all(point.one - point.other == pytest.approx(1) for point in found.curves if point.one and point.other)

    monkeypatch.setattr(sys, "argv", ["draftline", "diff", *urls])
    with pytest.raises(SystemExit) as end:
        cli.main()
    shown = capsys.readouterr().out
    assert not end.value.code
    for said in ("spec.run.seed", "data: no difference", "packages.torch", "evaluation.accept_length_after", "curves"):
        assert said in shown
    with pytest.raises(BadInput, match=r"expected a run's directory or archive with run\.json"):
        compare_runs(open_place(urls[0]), open_place(str(tmp_path / "nothing")))
