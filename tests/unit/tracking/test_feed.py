"""Telling a tracker of a run: from files, from where the last process left off, and whatever the tracker does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from disagg_core.files import LineFile
from disagg_core.report.document import EvaluationFigures, GateFigures, RunReport
from disagg_core.tracking import feed as feed_module
from disagg_core.tracking.feed import Feed, FeedState
from disagg_core.tracking.observer import Evaluated, Finished, Step, TrackedRun, scalars_of
from tests.unit.report.test_schema import REPORT

pytestmark = pytest.mark.unit

MEASURED = EvaluationFigures(
    draft_tokens=5,
    prompts=16,
    accept_length_before=1.0,
    accept_length_after=2.5,
    interval_after=None,
    per_position_after=[0.7],
    lossless=True,
)


class Tracker:
    """Keeps what it is told; while `away` it takes nothing."""

    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.away = False

    def _take(self, word: Any) -> None:
        if self.away:
            raise ConnectionError("the server is away")
        self.heard.append(word)

    def started(self, run: TrackedRun) -> None:
        self._take("started")

    def steps(self, draft: str, steps: Sequence[Step]) -> None:
        for step in steps:
            self._take((draft, step["step"]))

    def evaluated(self, draft: str, figures: EvaluationFigures) -> None:
        self._take(("evaluated", draft, figures.accept_length_after))

    def decided(self, gate: GateFigures, source: str) -> None:
        self._take(("decided", gate.decision))

    def finished(self, report: RunReport) -> None:
        self._take(("finished", report.state))

    def close(self) -> None:
        self._take("closed")


class Run:
    """The files of a run of two drafts, and the feed of one tracker."""

    def __init__(self, root: Path) -> None:
        self.tracker = Tracker()
        self.events, self.state = root / "events.jsonl", root / "state.json"
        self.metrics = {name: root / f"{name}.jsonl" for name in ("eagle3", "flash")}
        self.tracked = TrackedRun(
            run_id="night-1", name="night", root=root, document={}, identity={}, drafts=dict(self.metrics)
        )

    def step(self, draft: str, number: int) -> None:
        with self.metrics[draft].open("a") as file:
            file.write(json.dumps({"time": 1.0, "step": number, "loss": 2.0}) + "\n")

    def tell(self, event: Evaluated | Finished) -> None:
        LineFile(self.events).append(event.model_dump_json().encode())

    def feed(self) -> Feed:
        """What a new process of the run begins with."""
        return Feed(self.tracked, lambda: self.tracker, events=self.events, state=self.state)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "POLL_S", 0.0)


def after(*rounds: Any) -> Any:
    """Say that the run has ended once each of `rounds` was called in turn."""
    todo = list(rounds)

    def ended(_wait_s: float) -> bool:
        if not todo:
            return True
        todo.pop(0)()
        return False

    return ended


def test_what_a_run_writes_is_told_in_order_and_once(run: Run) -> None:
    def trains() -> None:
        run.step("eagle3", 1)
        run.step("flash", 1)
        run.step("eagle3", 2)

    def ends() -> None:
        run.tell(Evaluated(draft="flash", figures=MEASURED))
        run.tell(Finished(report=RunReport.model_validate(REPORT)))

    run.feed().follow(after(trains, ends), last_s=0)
    heard = run.tracker.heard
    assert heard[:4] == ["started", ("eagle3", 1), ("eagle3", 2), ("flash", 1)]
    assert heard[4:] == [("evaluated", "flash", 2.5), ("finished", "failed"), "closed"]


def test_a_later_process_of_the_run_goes_on_where_the_last_one_stopped(run: Run) -> None:
    run.step("eagle3", 1)
    run.feed().follow(after(), last_s=0)
    run.step("eagle3", 2)
    run.feed().follow(after(), last_s=0)
    assert run.tracker.heard == ["started", ("eagle3", 1), "closed", "started", ("eagle3", 2), "closed"]


def test_a_tracker_that_is_away_is_told_all_of_it_when_it_is_back(run: Run) -> None:
    problems = []

    def goes() -> None:
        run.step("eagle3", 1)
        run.tracker.away = True

    def comes_back() -> None:
        problems.append(FeedState.read(run.state).problem)
        run.step("eagle3", 2)
        run.tracker.away = False

    run.feed().follow(after(goes, lambda: None, comes_back), last_s=0)
    assert run.tracker.heard == ["started", ("eagle3", 1), ("eagle3", 2), "closed"]
    assert problems == ["ConnectionError: the server is away"]
    assert FeedState.read(run.state).problem is None


def test_a_tracker_that_never_comes_is_given_up_with_its_last_words(run: Run) -> None:
    run.tracker.away = True
    run.step("eagle3", 1)
    run.feed().follow(after(), last_s=0)
    assert run.tracker.heard == []
    assert FeedState.read(run.state).problem == "ConnectionError: the server is away"


def test_half_a_line_waits_for_its_other_half_and_a_damaged_one_is_passed_over(run: Run) -> None:
    path = run.metrics["eagle3"]
    path.write_bytes(b'{"step": 1, "lo\n\xff\n[1]\n{"step": 2}\n{"step"')

    def other_half() -> None:
        assert run.tracker.heard == ["started", ("eagle3", 2)]
        with path.open("ab") as file:
            file.write(b": 3}\n")

    run.feed().follow(after(lambda: None, other_half), last_s=0)
    assert run.tracker.heard == ["started", ("eagle3", 2), ("eagle3", 3), "closed"]


def test_the_figures_of_a_step_are_numbers_by_name() -> None:
    step = {"time": 1.0, "step": 3, "loss": 2.5, "accuracies": [0.5, 0.25], "in_flight": 8, "sample_age_s": None}
    assert dict(scalars_of(step)) == {"loss": 2.5, "accuracies/0": 0.5, "accuracies/1": 0.25, "in_flight": 8.0}


def test_what_held_out_samples_say_is_told_under_a_name_of_its_own(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(run.tracker, "steps", lambda draft, steps: told.extend(dict(step) for step in steps))
    path = run.tracked.root / "heldout.jsonl"
    run.tracked = run.tracked.model_copy(update={"heldout": {"flash": path}})
    path.write_text(json.dumps({"time": 1.0, "step": 4, "loss": 2.0, "accuracies": [0.5, 0.25]}) + "\n")
    run.feed().follow(after(), last_s=0)
    assert told == [{"time": 1.0, "step": 4, "heldout/loss": 2.0, "heldout/accuracies": [0.5, 0.25]}]
