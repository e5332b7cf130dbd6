"""The target continues each prompt once in a run: what it said is kept as tokens, and captured from there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from disagg_core.contracts import PromptTask
from disagg_core.engines.contract import Captured, Failed, Generated
from disagg_core.rollout import vocab_counts
from disagg_core.rollout.continuations import ContinuationLog, ContinuedTarget, Origin
from disagg_core.rollout.pace import Pace
from disagg_core.rollout.vocab_counts import vocab_maps_of
from disagg_core.run.plan import RunPlan, make_plan
from disagg_core.run_spec.yaml_file import load_spec
from disagg_core.target.facts import read_target_facts

pytestmark = pytest.mark.unit

DEMO = Path(__file__).resolve().parents[3] / "infra" / "runs" / "demo.yaml"
GREEDY = Origin(origin="a", sampled=False)
SAMPLED = Origin(origin="a", sampled=True)


class Parrot:
    """A target that says each prompt's last token twice, and notes what it is asked."""

    concurrency = 1

    def __init__(self, batch_size: int = 2) -> None:
        self.batch_size = batch_size
        self.generated: list[list[int]] = []
        self.captured: list[PromptTask] = []

    def generate(self, tasks: Sequence[PromptTask], *, avoid: object) -> Iterator[Generated | Failed]:
        self.generated.append([task.ordinal for task in tasks])
        for task in tasks:
            if task.input_ids[-1] == 13:
                yield Failed(task, "no room", retryable=False)
            else:
                yield Generated(task, [task.input_ids[-1]] * 2, seconds=0.5)

    def capture(self, tasks: Sequence[PromptTask], *, avoid: object) -> Iterator[Captured | Failed]:
        for task in tasks:
            self.captured.append(task)
            yield Captured(task, {}, len(task.input_ids))


def task(ordinal: int, last: int = 5) -> PromptTask:
    return PromptTask(ordinal=ordinal, source=f"x:{ordinal}", input_ids=[9, last], loss_mask=[0, 0])


def test_what_was_counted_is_captured_and_not_generated_again(tmp_path: Path) -> None:
    inner = Parrot()
    target = ContinuedTarget(inner, ContinuationLog(tmp_path / "kept.jsonl", SAMPLED))
    list(target.generate([task(0), task(1)], avoid={}))
    outcomes = list(target.capture([task(0), task(1)], avoid={}))
    assert inner.generated == [[0, 1]]
    assert [given.continuation for given in inner.captured] == [[5, 5], [5, 5]]
    assert [outcome.task for outcome in outcomes] == [task(0), task(1)]


def test_a_sample_says_what_its_continuation_took_the_first_time(tmp_path: Path) -> None:
    target = ContinuedTarget(Parrot(), ContinuationLog(tmp_path / "kept.jsonl", SAMPLED))
    first = list(target.capture([task(0, last=5), task(1, last=6)], avoid={}))
    again = list(target.capture([task(0, last=5)], avoid={}))
    assert [sample.generate_s for sample in first if isinstance(sample, Captured)] == [0.5, 0.5]
    assert [sample.generate_s for sample in again if isinstance(sample, Captured)] == [0.0]


def test_prompts_that_are_alike_are_decoded_once_and_take_the_time_of_one(tmp_path: Path) -> None:
    target = ContinuedTarget(Parrot(), ContinuationLog(tmp_path / "kept.jsonl", GREEDY))
    alike = list(target.capture([task(0), task(1)], avoid={}))
    assert [sample.generate_s for sample in alike if isinstance(sample, Captured)] == [0.5, 0.0]


def test_a_restarted_producer_generates_only_what_is_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    list(ContinuedTarget(Parrot(), ContinuationLog(path, SAMPLED)).generate([task(0), task(1)], avoid={}))
    again = Parrot()
    log = ContinuationLog(path, SAMPLED)
    made = list(ContinuedTarget(again, log).generate([task(0), task(1), task(2)], avoid={}))
    assert again.generated == [[2]]
    assert [(outcome.task.ordinal, outcome.tokens) for outcome in made] == [(n, [5, 5]) for n in range(3)]
    assert len(log) == 3


def test_a_greedy_continuation_is_found_by_its_prompt_in_the_next_epoch_too(tmp_path: Path) -> None:
    inner = Parrot()
    greedy = ContinuedTarget(inner, ContinuationLog(tmp_path / "greedy.jsonl", GREEDY))
    drawn = ContinuedTarget(inner, ContinuationLog(tmp_path / "drawn.jsonl", SAMPLED))
    for target in (greedy, drawn):
        list(target.generate([task(0)], avoid={}))
        list(target.generate([task(7)], avoid={}))
    assert inner.generated == [[0], [0], [7]]


@pytest.mark.parametrize("cut", [1, 7, 30])
def test_a_torn_last_line_costs_its_group_and_nothing_else(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "kept.jsonl"
    first = ContinuationLog(path, SAMPLED)
    first.keep([Generated(task(0), [1, 2]), Generated(task(1), [3])])
    first.keep([Generated(task(2), [4, 5]), Generated(task(3), [6])])
    path.write_bytes(path.read_bytes()[:-cut])
    log = ContinuationLog(path, SAMPLED)
    assert [log.find(task(n)) for n in range(4)] == [[1, 2], [3], None, None]
    log.keep([Generated(task(2), [4, 5])])
    assert ContinuationLog(path, SAMPLED).find(task(2)) == [4, 5]


def test_a_damaged_line_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    log = ContinuationLog(path, SAMPLED)
    for number in range(3):
        log.keep([Generated(task(number), [40 + number])])
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = json.loads(lines[2])
    damaged["tokens"] = [[99]]
    path.write_bytes(b"".join([*lines[:2], json.dumps(damaged).encode() + b"\n", b"\x00\xff\n", lines[3]]))
    again = ContinuationLog(path, SAMPLED)
    assert [again.find(task(n)) for n in range(3)] == [[40], None, [42]]


def test_continuations_of_something_else_are_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "kept.jsonl"
    ContinuationLog(path, SAMPLED).keep([Generated(task(0), [1])])
    other = ContinuationLog(path, Origin(origin="b", sampled=True))
    assert other.find(task(0)) is None
    assert "begun anew" in caplog.text
    assert len(ContinuationLog(path, SAMPLED)) == 0


def test_a_prompt_that_cannot_be_continued_is_an_outcome_and_not_kept(tmp_path: Path) -> None:
    log = ContinuationLog(tmp_path / "kept.jsonl", SAMPLED)
    target = ContinuedTarget(Parrot(), log)
    outcomes = {o.task.ordinal: type(o) for o in target.capture([task(0), task(1, last=13)], avoid={})}
    assert outcomes == {0: Captured, 1: Failed}
    assert len(log) == 1


def a_plan(folder: Path, *overrides: str) -> RunPlan:
    prompts = folder / "prompts.jsonl"
    prompts.write_text(json.dumps({"text": "x"}) + "\n")
    spec = load_spec(DEMO, ["draft.vocab_size=4", f"data.prompts={prompts}", *overrides])
    return make_plan(spec, read_target_facts(spec.target), run_id="run", root=folder / "run", total_prompts=4)


class Ordinals:
    """Four prompts."""

    end = 4

    def task(self, ordinal: int) -> PromptTask | None:
        return task(ordinal, last=50 + ordinal) if ordinal < 4 else None

    def close(self) -> None:
        """Nothing to close."""


def test_the_prompts_are_counted_in_the_groups_in_which_they_are_captured(tmp_path: Path) -> None:
    plan, inner = a_plan(tmp_path), Parrot(batch_size=3)
    target = ContinuedTarget(inner, ContinuationLog(plan.dir.continuations, Origin.of(plan)))
    (made,) = vocab_maps_of(plan, Ordinals(), target, cache=tmp_path / "cache", progress=lambda done, total: None)
    assert inner.generated == [[0, 1, 2], [3]]
    assert made.target_ids.tolist() == [2, 50, 51, 52], "the token that ends a turn is always among them"
    list(target.capture([task(n, last=50 + n) for n in range(3)], avoid={}))
    assert inner.generated == [[0, 1, 2], [3]]


def test_the_origin_follows_target_and_sampling_and_for_drawn_ones_the_seed(tmp_path: Path) -> None:
    greedy, drawn = a_plan(tmp_path), a_plan(tmp_path, "data.generate.temperature=0.7")
    assert Origin.of(greedy) == Origin.of(a_plan(tmp_path, "run.seed=9"))
    assert Origin.of(drawn) != Origin.of(a_plan(tmp_path, "data.generate.temperature=0.7", "run.seed=9"))
    assert Origin.of(greedy) != Origin.of(a_plan(tmp_path, "data.generate.max_new_tokens=7"))


def test_a_pace_says_nothing_of_what_was_there_before() -> None:
    now = 100.0
    pace = Pace(begun=256, clock=lambda: now)
    assert pace.fields(256, 512) == {"samples_per_s": None, "left_s": None}
    now = 110.0
    assert pace.fields(276, 512) == {"samples_per_s": 2.0, "left_s": 118}
    assert pace.fields(276, None) == {"samples_per_s": 2.0, "left_s": None}


def test_a_pace_says_nothing_while_too_little_was_done_to_tell() -> None:
    now = 0.0
    pace = Pace(clock=lambda: now)
    unknown = {"samples_per_s": None, "left_s": None}
    now = 32.0
    assert pace.fields(1, 512) == unknown, "one prompt of a batch that took half a minute"
    now = 9.9
    assert pace.fields(64, 512) == unknown, "a first batch that came at once"
    now = 32.0
    assert pace.fields(64, 512) == {"samples_per_s": 2.0, "left_s": 224}


def test_all_of_a_batch_is_told_as_counted_while_the_next_one_is_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocab_counts, "_REPORT_S", 0.0)

    class Watched(Parrot):
        def generate(self, batch: Sequence[PromptTask], *, avoid: object) -> Iterator[Generated | Failed]:
            told_before.append(told[-1] if told else 0)
            return super().generate(batch, avoid=avoid)

    told: list[int] = []
    told_before: list[int] = []
    plan = a_plan(tmp_path)
    target = ContinuedTarget(Watched(batch_size=3), ContinuationLog(plan.dir.continuations, Origin.of(plan)))
    vocab_maps_of(plan, Ordinals(), target, cache=tmp_path / "c", progress=lambda done, total: told.append(done))
    assert told_before == [0, 3]
